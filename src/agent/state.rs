//! What the agent knows and what is to be done next. A state machine without effects: it is told updates, results and the
//! time, and says which operations to begin and which events to tell. At most one operation runs per container, and the last
//! wish wins whatever came in between.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use crate::{
    plan::{LeftOut, Step, Wish},
    pods::{Pod, Started, Trigger, Update},
    policy::{self, Problem},
    report::{
        events::{PodEvent, PodRef, Reason},
        http::Known,
        metrics::ContainerState,
    },
    runtime::ContainerId,
    view::{FileSet, ViewFile},
};

/// The first and the longest wait before a failed operation is tried again; doubled each time.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The same for an lxcfs that does not serve.
const LXCFS_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// An operation to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    pub id: ContainerId,
    pub wish: Wish,
    /// For the log: `namespace/pod/container`.
    pub name: String,
    /// The container's first process, where the runtime told it.
    pub pid: Option<i64>,
}

/// What to do now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Due {
    pub start: Vec<Start>,
    /// Operations wait for the serving lxcfs: find it.
    pub find_lxcfs: bool,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The container is as it was wished.
    Done { done: Vec<Step>, left_out: Vec<(ViewFile, LeftOut)> },
    /// It is not, or not wholly; it will be tried again.
    Failed { done: Vec<Step>, why: String },
    /// Its thread hangs: told now, and it counts as running until another result comes.
    Hangs { why: String },
    /// The container does not run (any more, or yet), or the runtime cannot tell: tried again, and nobody is told.
    Later,
    /// It can have no view.
    Unsupported { why: String },
}

/// What is known of the serving lxcfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lxcfs {
    Unknown,
    Finding { attempt: u32 },
    Serves,
    Absent { attempt: u32, again: Instant },
}

#[derive(Debug)]
struct Container {
    pod: String,
    name: String,
    /// As [`State`]'s.
    adopt: bool,
    wish: Wish,
    /// The wish that it was last brought to.
    settled: Option<Wish>,
    running: Option<Wish>,
    /// The operation that runs settles nothing: lxcfs changed meanwhile.
    again: bool,
    /// With adoption: its last operation had no lxcfs, and another is due when there is one.
    unadopted: bool,
    /// A failed operation waits until then.
    retry: Option<(u32, Instant)>,
    /// The warning that was told last, so that it is not told again at each retry.
    told: Option<String>,
    pid: Option<i64>,
    /// Who told of its wish, and when: until the view is in place.
    since: Option<(Trigger, Instant)>,
}

/// A container that the runtime told of, and the watch of the pods has not yet.
#[derive(Debug)]
struct Early {
    pod: String,
    name: String,
    pid: Option<i64>,
    since: (Trigger, Instant),
}

/// What is to be told of a pod when none of its containers is being worked on.
#[derive(Debug, Default)]
struct Report {
    injected: BTreeMap<String, FileSet>,
    removed: BTreeMap<String, FileSet>,
    remounted: BTreeMap<String, FileSet>,
    left_out: BTreeMap<String, Vec<String>>,
    failed: BTreeMap<String, String>,
    unsupported: BTreeMap<String, String>,
}

#[derive(Debug)]
struct PodState {
    pod: Pod,
    problems: Vec<Problem>,
    report: Report,
    /// The watch told of it; else it is known from the runtime alone, as it was when its sandbox was made.
    listed: bool,
}

/// The agent's state.
#[derive(Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "two flags of the command line and two lists that are there or not yet"
)]
pub struct State {
    inject_by_default: bool,
    pods_listed: bool,
    /// Without them a pod of a labelled namespace would lose its view for a moment when the agent starts.
    namespaces_listed: bool,
    pods: HashMap<String, PodState>,
    labels: HashMap<String, String>,
    containers: HashMap<ContainerId, Container>,
    early: HashMap<ContainerId, Early>,
    lxcfs: Lxcfs,
    /// Sweeps that run now. They go by device numbers, and a new lxcfs may have that of one that is gone: nothing is put in.
    sweeps: usize,
    /// lxcfs files that came with a pod are kept current too: every container needs lxcfs.
    adopt: bool,
    events: Vec<PodEvent>,
    latencies: Vec<(Trigger, Duration)>,
}

impl State {
    /// `has_namespaces`: whether updates of namespaces will come, so that decisions wait for the first.
    pub fn new(inject_by_default: bool, has_namespaces: bool, adopt: bool) -> State {
        State {
            inject_by_default,
            adopt,
            pods_listed: false,
            namespaces_listed: !has_namespaces,
            pods: HashMap::new(),
            labels: HashMap::new(),
            containers: HashMap::new(),
            early: HashMap::new(),
            lxcfs: Lxcfs::Unknown,
            sweeps: 0,
            events: Vec::new(),
            latencies: Vec::new(),
        }
    }

    /// Takes what a watcher tells at `now`.
    pub fn update(&mut self, update: Update, now: Instant) {
        match update {
            Update::Pods(pods) => {
                self.pods_listed = true;
                let listed: HashSet<&str> = pods.iter().map(|p| p.uid.as_str()).collect();
                self.pods.values_mut().for_each(|p| p.listed = listed.contains(p.pod.uid.as_str()));
                let early = &self.early;
                let kept = |id: &ContainerId, c: &mut Container| {
                    listed.contains(c.pod.as_str()) || c.running.is_some() || early.contains_key(id)
                };
                self.containers.retain(kept);
                pods.into_iter().for_each(|pod| self.put(pod));
                self.forget();
                self.decide_all(now);
            }
            Update::Pod(pod) => {
                let uid = pod.uid.clone();
                self.put(pod);
                self.forget();
                self.decide(&uid, now);
            }
            Update::PodGone(uid) => {
                self.pods.remove(&uid);
                self.early.retain(|_, early| early.pod != uid);
                self.containers.retain(|_, c| c.pod != uid || c.running.is_some());
            }
            Update::Namespaces(namespaces) => {
                self.namespaces_listed = true;
                self.labels = namespaces.into_iter().map(|n| (n.name, n.label)).collect();
                self.decide_all(now);
            }
            Update::Namespace(namespace) => {
                self.labels.insert(namespace.name.clone(), namespace.label);
                self.decide_namespace(&namespace.name, now);
            }
            Update::NamespaceGone(name) => {
                self.labels.remove(&name);
                self.decide_namespace(&name, now);
            }
            Update::Started(started, trigger) => self.started(started, trigger, now),
            Update::Ended(id) => self.ended(&id),
            Update::Running { running, by, asked } => {
                let known: HashSet<&ContainerId> = running.iter().map(|started| &started.id).collect();
                // One that has started since is not in the list.
                let gone = |(id, early): &(&ContainerId, &Early)| early.since.1 < asked && !known.contains(id);
                let gone: Vec<ContainerId> = self.early.iter().filter(gone).map(|(id, _)| id.clone()).collect();
                gone.iter().for_each(|id| self.ended(id));
                running.into_iter().for_each(|started| self.started(started, by, now));
            }
        }
    }

    fn started(&mut self, Started { pod, name, id, pid }: Started, trigger: Trigger, now: Instant) {
        if let Some(known) = self.containers.get_mut(&id) {
            // Another told of it first. If it could not be found then, it can be now.
            known.pid = pid.or(known.pid);
            known.retry = None;
            return;
        }
        let uid = pod.uid.clone();
        self.pods.entry(uid.clone()).or_insert_with(|| PodState {
            pod,
            problems: Vec::new(),
            report: Report::default(),
            listed: false,
        });
        self.early.insert(id, Early { pod: uid.clone(), name, pid, since: (trigger, now) });
        self.decide(&uid, now);
    }

    /// What the watch of the pods knows of is its matter.
    fn ended(&mut self, id: &ContainerId) {
        if self.early.remove(id).is_some() {
            self.containers.retain(|known, c| known != id || c.running.is_some());
            self.forget();
        }
    }

    /// Drops pods that nobody knows of any more.
    fn forget(&mut self) {
        let early: HashSet<&str> = self.early.values().map(|early| early.pod.as_str()).collect();
        self.pods.retain(|uid, pod| pod.listed || early.contains(uid.as_str()));
    }

    /// What to begin at `now`. Each operation told here is taken to run until [`State::finished`].
    pub fn due(&mut self, now: Instant) -> Due {
        let mut due = Due::default();
        let serves = self.lxcfs_usable();
        for (id, c) in &mut self.containers {
            due.find_lxcfs |= c.unadopted;
            let Some(pod) = self.pods.get(&c.pod) else { continue };
            if !c.waits() || c.retry.is_some_and(|(_, at)| at > now) {
                continue;
            }
            if c.needs_lxcfs() && !serves {
                due.find_lxcfs = true;
                continue;
            }
            c.running = Some(c.wish);
            c.unadopted = c.adopt && !serves;
            let name = format!("{}/{}/{}", pod.pod.namespace, pod.pod.name, c.name);
            due.start.push(Start { id: id.clone(), wish: c.wish, name, pid: c.pid });
            due.find_lxcfs |= c.unadopted;
        }
        due.find_lxcfs &= self.sweeps == 0 && !serves;
        if due.find_lxcfs {
            match self.lxcfs {
                Lxcfs::Unknown => self.lxcfs = Lxcfs::Finding { attempt: 0 },
                Lxcfs::Absent { attempt, again } if again <= now => self.lxcfs = Lxcfs::Finding { attempt },
                _ => due.find_lxcfs = false,
            }
        }
        due
    }

    /// When [`State::due`] has something to say next, if nothing else happens. It has said what it had at `now`.
    pub fn next(&self) -> Option<Instant> {
        let wakes = |c: &Container| {
            let retry = c.retry.map(|(_, at)| at);
            match self.lxcfs {
                _ if c.waits() && !c.needs_lxcfs() && !c.unadopted => retry,
                _ if !c.waits() && !c.unadopted => None,
                // Their ends are told.
                _ if self.sweeps > 0 => None,
                Lxcfs::Finding { .. } => None,
                Lxcfs::Absent { again, .. } => retry.max(Some(again)),
                Lxcfs::Unknown | Lxcfs::Serves => retry,
            }
        };
        self.containers.values().filter_map(wakes).min()
    }

    /// Whether an operation on the container runs, or will begin as soon as lxcfs was asked: worth waiting for.
    pub fn pending(&self, id: &ContainerId) -> bool {
        let lxcfs = !matches!(self.lxcfs, Lxcfs::Absent { .. } | Lxcfs::Finding { attempt: 1.. });
        let pending =
            |c: &Container| c.running.is_some() || (c.waits() && c.retry.is_none() && (lxcfs || !c.needs_lxcfs()));
        self.containers.get(id).is_some_and(pending)
    }

    /// A sweep begins; see [`State::swept`].
    pub fn sweeps(&mut self) {
        self.sweeps += 1;
    }

    /// A sweep has ended.
    pub fn swept(&mut self) {
        self.sweeps -= 1;
    }

    fn lxcfs_usable(&self) -> bool {
        self.lxcfs == Lxcfs::Serves && self.sweeps == 0
    }

    /// Takes the answer to [`Due::find_lxcfs`].
    pub fn lxcfs_found(&mut self, found: Result<(), String>, now: Instant) {
        let Lxcfs::Finding { attempt } = self.lxcfs else { return };
        let Err(why) = found else {
            self.lxcfs = Lxcfs::Serves;
            for c in self.containers.values_mut() {
                if std::mem::take(&mut c.unadopted) {
                    c.look_again();
                }
            }
            return;
        };
        self.lxcfs = Lxcfs::Absent { attempt: attempt + 1, again: now + backoff(LXCFS_RETRY, attempt) };
        // One failure is a restart of lxcfs, and not worth an event on every pod that starts meanwhile.
        if attempt == 0 {
            return;
        }
        for c in self.containers.values_mut().filter(|c| c.waits() && c.needs_lxcfs()) {
            if c.told.as_ref() != Some(&why)
                && let Some(pod) = self.pods.get_mut(&c.pod)
            {
                c.told = Some(why.clone());
                pod.report.failed.insert(c.name.clone(), why.clone());
            }
        }
        self.report_all();
    }

    /// Whether lxcfs is looked for the first time since it served.
    pub fn lxcfs_missing_first(&self) -> bool {
        matches!(self.lxcfs, Lxcfs::Finding { attempt: 0 })
    }

    /// The lxcfs that was found is no longer held: the next operation that needs one finds it anew.
    pub fn lxcfs_released(&mut self) {
        if self.lxcfs == Lxcfs::Serves {
            self.lxcfs = Lxcfs::Unknown;
        }
    }

    /// Another lxcfs serves, or none: what is known of it is no longer true, and every view is looked at again.
    pub fn lxcfs_changed(&mut self) {
        self.lxcfs = Lxcfs::Unknown;
        let has_view = |wish: Option<Wish>| wish.is_some_and(|wish| wish != Wish::Nothing);
        for c in self.containers.values_mut() {
            if c.adopt || c.needs_lxcfs() || has_view(c.settled) || has_view(c.running) {
                c.look_again();
            }
        }
    }

    /// Takes the result of an operation.
    pub fn finished(&mut self, id: &ContainerId, finished: Finished, now: Instant) {
        let Some(c) = self.containers.get_mut(id) else { return };
        let Some(wish) = c.running else { return };
        let Some(pod) = self.pods.get_mut(&c.pod) else {
            // The pod went while the operation ran; one that hangs is kept, so that no second one is begun.
            if !matches!(finished, Finished::Hangs { .. }) {
                self.containers.remove(id);
            }
            return;
        };
        let listed = || pod.pod.containers.iter().any(|known| known.id.as_ref() == Some(id));
        let known = self.early.contains_key(id) || listed();
        let report = &mut pod.report;
        let mut hangs = false;
        match finished {
            Finished::Done { done, left_out } => {
                report.steps(&c.name, &done);
                if let Some((trigger, at)) = c.since.take()
                    && done.iter().any(|step| matches!(step, Step::Inject(_)))
                {
                    self.latencies.push((trigger, now.saturating_duration_since(at)));
                }
                let nothing = done.is_empty() && matches!(wish, Wish::Files(f) if f.len() <= left_out.len());
                let left_out: Vec<String> = left_out.iter().map(|(file, why)| format!("{file} ({why})")).collect();
                if nothing {
                    let why = format!("nothing could be put in; left out: {}", left_out.join(", "));
                    warn(&mut c.told, &mut report.failed, &c.name, why);
                } else {
                    c.told = None;
                    if !left_out.is_empty() {
                        report.left_out.insert(c.name.clone(), left_out);
                    }
                }
                c.settled = Some(wish);
                c.retry = None;
            }
            Finished::Failed { done, why } => {
                report.steps(&c.name, &done);
                warn(&mut c.told, &mut report.failed, &c.name, why);
                c.fail(now);
            }
            Finished::Hangs { why } => {
                warn(&mut c.told, &mut report.failed, &c.name, why);
                hangs = true;
            }
            Finished::Later => c.fail(now),
            Finished::Unsupported { why } => {
                // Nothing is lost on a container that does not want a view.
                if wish != Wish::Nothing {
                    warn(&mut c.told, &mut report.unsupported, &c.name, why);
                }
                c.settled = Some(wish);
                c.retry = None;
            }
        }
        if !hangs {
            c.running = None;
            if std::mem::take(&mut c.again) {
                c.settled = None;
                c.retry = None;
            }
            if !known {
                self.containers.remove(id);
            }
        }
        self.report_all();
    }

    /// Has every container looked at again: what is as it must be, stays.
    pub fn resync(&mut self) {
        self.containers.values_mut().for_each(|c| c.settled = None);
    }

    /// The events to tell since the last call.
    pub fn take_events(&mut self) -> Vec<PodEvent> {
        std::mem::take(&mut self.events)
    }

    /// How long each view took since the last call, from who told of it first to its being in place.
    pub fn take_latencies(&mut self) -> Vec<(Trigger, Duration)> {
        std::mem::take(&mut self.latencies)
    }

    /// Why nothing can be decided yet.
    pub fn waits_for(&self) -> Option<&'static str> {
        match (self.pods_listed, self.namespaces_listed) {
            (false, _) => Some("pods not listed yet"),
            (true, false) => Some("namespaces not listed yet"),
            (true, true) => None,
        }
    }

    /// The containers that want a view, or may.
    pub fn known(&self) -> Vec<Known> {
        let known = |(id, c): (&ContainerId, &Container)| {
            let pod = &self.pods.get(&c.pod)?.pod;
            let (wish, state) = match c.wish {
                Wish::Nothing => return None,
                Wish::Keep if self.pods[&c.pod].problems.is_empty() => return None,
                Wish::Keep => ("keep".to_owned(), ContainerState::Skipped),
                Wish::Files(files) | Wish::Add(files) => {
                    let wish = if files == FileSet::ALL { "all".to_owned() } else { files.to_string() };
                    let state = match (c.settled == Some(c.wish), &c.told) {
                        (true, None) => ContainerState::Injected,
                        (true, Some(_)) => ContainerState::Skipped,
                        (false, Some(_)) => ContainerState::Failed,
                        (false, None) => ContainerState::Pending,
                    };
                    (wish, state)
                }
            };
            Some(Known {
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                container: c.name.clone(),
                id: id.clone(),
                state,
                wish,
                why: c.told.clone(),
            })
        };
        self.containers.iter().filter_map(known).collect()
    }

    /// Whether every view that is wished is in place, or nothing can be done about it now.
    pub fn is_at_rest(&self) -> bool {
        self.containers.values().all(|c| c.running.is_none() && (!c.waits() || c.retry.is_some()))
    }

    /// Operations that run now.
    pub fn running(&self) -> usize {
        self.containers.values().filter(|c| c.running.is_some()).count()
    }

    /// Takes a pod as the watch tells it.
    fn put(&mut self, pod: Pod) {
        for container in &pod.containers {
            let Some(id) = &container.id else { continue };
            // A static pod has another uid at the API server than at the runtime.
            if let Some(known) = self.containers.get_mut(id) {
                known.pod.clone_from(&pod.uid);
            }
            // Those that started before it have ended, though nobody told.
            if let Some(Early { since: (_, at), .. }) = self.early.remove(id) {
                let older = |early: &Early| early.pod == pod.uid && early.name == container.name && early.since.1 <= at;
                self.early.retain(|_, early| !older(early));
            }
        }
        match self.pods.get_mut(&pod.uid) {
            Some(known) => (known.pod, known.listed) = (pod, true),
            None => {
                let state = PodState { problems: Vec::new(), report: Report::default(), pod, listed: true };
                self.pods.insert(state.pod.uid.clone(), state);
            }
        }
    }

    fn decide_all(&mut self, now: Instant) {
        let uids: Vec<String> = self.pods.keys().cloned().collect();
        uids.iter().for_each(|uid| self.decide(uid, now));
    }

    fn decide_namespace(&mut self, namespace: &str, now: Instant) {
        let of = |pod: &PodState| pod.pod.namespace == namespace;
        let uids: Vec<String> = self.pods.iter().filter(|(_, pod)| of(pod)).map(|(uid, _)| uid.clone()).collect();
        uids.iter().for_each(|uid| self.decide(uid, now));
    }

    /// Brings the wishes of a pod's containers up to date.
    fn decide(&mut self, uid: &str, now: Instant) {
        let Some(PodState { pod, problems, listed, .. }) = self.pods.get_mut(uid) else { return };
        // The runtime knows the annotations that a pod was made with: enough where they decide, before anything is listed.
        if !self.namespaces_listed && (*listed || pod.annotations.inject.is_none()) {
            return;
        }
        let mut containers: Vec<(&str, Option<&ContainerId>)> =
            pod.containers.iter().map(|c| (c.name.as_str(), c.id.as_ref())).collect();
        let early = self.early.iter().filter(|(_, early)| early.pod == uid);
        containers.extend(early.map(|(id, early)| (early.name.as_str(), Some(id))));
        let mut names: Vec<&str> = containers.iter().map(|(name, _)| *name).collect();
        if !*listed {
            // The runtime does not tell which containers a pod has; so whatever is named is taken to be one.
            names.extend(pod.annotations.containers.iter().flat_map(|all| all.split(',')).map(str::trim));
        }
        names.sort_unstable();
        names.dedup();
        let label = self.labels.get(&pod.namespace).map(String::as_str);
        let wishes = policy::wishes(&pod.annotations, label, self.inject_by_default, &names);
        if *listed && *problems != wishes.problems {
            if !wishes.problems.is_empty() {
                let note = wishes.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                self.events.push(PodEvent { pod: reference(pod), reason: Reason::LxcfsInvalidAnnotation, note });
            }
            *problems = wishes.problems;
        }
        let running: HashSet<&ContainerId> = containers.iter().filter_map(|(_, id)| *id).collect();
        self.containers.retain(|id, c| c.pod != uid || running.contains(id) || c.running.is_some());
        for (name, id) in containers {
            let (Some(id), Some(wish)) = (id, wishes.by_container.get(name)) else { continue };
            let wish = match *wish {
                wish if *listed => wish,
                // The annotations may have been changed since: nothing is taken out by old ones.
                Wish::Files(files) => Wish::Add(files),
                _ => Wish::Keep,
            };
            let early = self.early.get(id);
            let since = early.map_or((Trigger::Watch, now), |early| early.since);
            let known = self.containers.entry(id.clone()).or_insert_with(|| Container {
                pod: uid.to_owned(),
                name: name.to_owned(),
                adopt: self.adopt,
                wish,
                settled: None,
                running: None,
                again: false,
                unadopted: false,
                retry: None,
                told: None,
                pid: early.and_then(|early| early.pid),
                since: Some(since),
            });
            if known.wish != wish {
                known.wish = wish;
                known.retry = None;
                known.told = None;
                known.since = Some((Trigger::Watch, now));
            }
        }
    }

    /// Turns the reports of pods that nothing is being done to into events.
    fn report_all(&mut self) {
        let busy: HashSet<&str> = self
            .containers
            .values()
            .filter(|c| c.running.is_some() && c.told.is_none())
            .map(|c| c.pod.as_str())
            .collect();
        for (uid, pod) in &mut self.pods {
            if !busy.contains(uid.as_str()) {
                let told = std::mem::take(&mut pod.report).events();
                self.events.extend(told.into_iter().map(|(reason, note)| PodEvent {
                    pod: reference(&pod.pod),
                    reason,
                    note,
                }));
            }
        }
    }
}

impl Container {
    /// Whether an operation is to be begun.
    fn waits(&self) -> bool {
        let settled = (self.wish == Wish::Keep && !self.adopt) || self.settled == Some(self.wish);
        self.running.is_none() && !settled
    }

    /// Whatever it was brought to is to be looked at again. An operation that runs may have begun with what is no longer true,
    /// so its result is not the end.
    fn look_again(&mut self) {
        self.settled = None;
        self.retry = None;
        self.again = self.running.is_some();
    }

    /// What takes a view out needs no lxcfs.
    fn needs_lxcfs(&self) -> bool {
        !matches!(self.wish, Wish::Nothing | Wish::Keep)
    }

    fn fail(&mut self, now: Instant) {
        let attempt = self.retry.map_or(0, |(attempt, _)| attempt);
        self.retry = Some((attempt + 1, now + backoff(RETRY, attempt)));
        self.settled = None;
    }
}

/// Notes a warning unless it was the last one told.
fn warn(told: &mut Option<String>, warnings: &mut BTreeMap<String, String>, container: &str, why: String) {
    if told.as_ref() != Some(&why) {
        warnings.insert(container.to_owned(), why.clone());
        *told = Some(why);
    }
}

fn backoff((first, longest): (Duration, Duration), attempt: u32) -> Duration {
    first.saturating_mul(1 << attempt.min(16)).min(longest)
}

fn reference(pod: &Pod) -> PodRef {
    PodRef { uid: pod.uid.clone(), namespace: pod.namespace.clone(), name: pod.name.clone() }
}

impl Report {
    fn steps(&mut self, container: &str, done: &[Step]) {
        for step in done {
            let kind = match step {
                Step::Inject(_) => &mut self.injected,
                Step::Remove(..) => &mut self.removed,
                Step::Swap(..) | Step::Adopt(..) => &mut self.remounted,
            };
            kind.entry(container.to_owned()).or_default().insert(step.file());
        }
    }

    /// At most one event of each reason.
    fn events(self) -> Vec<(Reason, String)> {
        let left_out = self.left_out.iter().map(|(c, files)| format!("left out in {c}: {}", files.join(", ")));
        let left_out: String = left_out.map(|text| format!("; {text}")).collect();
        let files = |what: &str, changed: &BTreeMap<String, FileSet>| {
            let each = changed.iter().map(|(c, files)| format!("{c}: {files}"));
            format!("{what} {}", each.collect::<Vec<_>>().join("; "))
        };
        let causes = |warnings: &BTreeMap<String, String>| {
            warnings.iter().map(|(c, why)| format!("{c}: {why}")).collect::<Vec<_>>().join("; ")
        };
        let mut events = Vec::new();
        if !self.injected.is_empty() {
            events.push((Reason::LxcfsInjected, files("view put into", &self.injected) + &left_out));
        }
        if !self.remounted.is_empty() {
            events.push((Reason::LxcfsRemounted, files("view made current in", &self.remounted)));
        }
        if !self.removed.is_empty() {
            events.push((Reason::LxcfsRemoved, files("view taken out of", &self.removed)));
        }
        if !self.failed.is_empty() {
            events.push((Reason::LxcfsInjectFailed, causes(&self.failed)));
        }
        if !self.unsupported.is_empty() {
            events.push((Reason::LxcfsUnsupportedRuntime, causes(&self.unsupported)));
        }
        events
    }
}

#[cfg(test)]
mod tests;
