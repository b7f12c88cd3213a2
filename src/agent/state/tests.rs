//! The state machine alone, and against a model: whatever comes in between, every container ends as the last wish asks for.

use proptest::prelude::*;

use super::*;
use crate::{
    pods::{self, Namespace},
    policy::Annotations,
};

const NAMES: [&str; 2] = ["a", "b"];

fn id(n: u32) -> ContainerId {
    ContainerId::new(&format!("id{n}")).unwrap()
}

fn pod(uid: &str, inject: Option<&str>, ids: [Option<u32>; 2]) -> Pod {
    let containers = NAMES.iter().zip(ids).map(|(name, n)| pods::Container { name: (*name).into(), id: n.map(id) });
    Pod {
        uid: uid.into(),
        namespace: "ns".into(),
        name: uid.into(),
        annotations: Annotations { inject: inject.map(Into::into), ..Annotations::default() },
        containers: containers.collect(),
    }
}

fn listed(pods: Vec<Pod>) -> State {
    let mut state = State::new(false, true, false);
    state.update(Update::Namespaces(Vec::new()), Instant::now());
    state.update(Update::Pods(pods), Instant::now());
    state
}

fn done(steps: impl IntoIterator<Item = Step>) -> Finished {
    Finished::Done { done: steps.into_iter().collect(), left_out: Vec::new() }
}

fn ids(due: &Due) -> Vec<String> {
    let mut ids: Vec<String> = due.start.iter().map(|s| s.id.to_string()).collect();
    ids.sort();
    ids
}

#[test]
fn nothing_is_decided_before_pods_and_namespaces_are_listed() {
    let now = Instant::now();
    let mut state = State::new(false, true, false);
    state.update(Update::Pods(vec![pod("p", None, [Some(1), None])]), Instant::now());
    assert_eq!(state.due(now), Due::default());
    state.update(Update::Namespaces(vec![Namespace { name: "ns".into(), label: "true".into() }]), Instant::now());
    assert!(state.due(now).find_lxcfs);
    state.lxcfs_found(Ok(()), now);
    assert_eq!(ids(&state.due(now)), ["id1"]);
}

#[test]
fn the_last_wish_wins_and_a_pod_gets_one_event_of_a_kind() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), Some(2)])]);
    assert!(state.due(now).find_lxcfs);
    state.lxcfs_found(Ok(()), now);
    assert_eq!(ids(&state.due(now)), ["id1", "id2"]);
    state.finished(&id(1), done([Step::Inject(ViewFile::Meminfo)]), now);
    assert_eq!(state.take_events(), [], "the other container is worked on still");
    // The pod opts out while the second one is worked on: that one is begun again, not beside it.
    state.update(Update::Pod(pod("p", Some("false"), [Some(1), Some(2)])), Instant::now());
    assert_eq!(ids(&state.due(now)), ["id1"]);
    state.finished(&id(1), done([Step::Remove(ViewFile::Meminfo, 7)]), now);
    state.finished(&id(2), done([Step::Inject(ViewFile::Meminfo)]), now);
    let events = state.take_events();
    let reasons: Vec<Reason> = events.iter().map(|e| e.reason).collect();
    assert_eq!(reasons, [Reason::LxcfsInjected, Reason::LxcfsRemoved]);
    assert_eq!(events[0].note, "view put into a: meminfo; b: meminfo");
    assert_eq!(ids(&state.due(now)), ["id2"]);
    state.finished(&id(2), done([Step::Remove(ViewFile::Meminfo, 7)]), now);
    assert_eq!(state.due(now), Due::default());
    assert_eq!(state.next(), None);
}

#[test]
fn opt_outs_go_on_while_lxcfs_is_absent_or_swept_and_time_is_not_wasted() {
    let now = Instant::now();
    let mut state = listed(vec![pod("in", Some("true"), [Some(1), None]), pod("out", Some("false"), [Some(2), None])]);
    state.sweeps();
    let due = state.due(now);
    assert_eq!((ids(&due), due.find_lxcfs), (vec!["id2".to_owned()], false));
    assert_eq!(state.next(), None, "the end of the sweep is told");
    state.swept();
    assert!(state.due(now).find_lxcfs);
    state.lxcfs_found(Err("away".into()), now);
    assert_eq!(state.due(now), Due::default());
    assert_eq!(state.next(), Some(now + LXCFS_RETRY.0));
    // A failed operation whose time has come waits for lxcfs too, and does not make the loop spin.
    state.finished(&id(2), Finished::Failed { done: Vec::new(), why: "no".into() }, now);
    let later = now + LXCFS_RETRY.0;
    let due = state.due(later);
    assert_eq!((ids(&due), due.find_lxcfs), (vec!["id2".to_owned()], true));
    assert_eq!(state.next(), None);
}

#[test]
fn a_warning_is_told_once_and_again_only_when_it_changes() {
    let mut now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), None])]);
    state.due(now);
    state.lxcfs_found(Ok(()), now);
    for (why, events) in [("no", 1), ("no", 0), ("other", 1)] {
        assert_eq!(ids(&state.due(now)), ["id1"]);
        state.finished(&id(1), Finished::Failed { done: Vec::new(), why: why.into() }, now);
        assert_eq!(state.take_events().len(), events, "{why}");
        now = state.next().unwrap();
    }
}

#[test]
fn with_adoption_an_operation_without_lxcfs_is_done_again_when_there_is_one() {
    let now = Instant::now();
    let mut state = State::new(false, false, true);
    state.update(Update::Pods(vec![pod("p", None, [Some(1), None])]), Instant::now());
    let due = state.due(now);
    assert_eq!((ids(&due), due.find_lxcfs), (vec!["id1".to_owned()], true));
    state.lxcfs_found(Ok(()), now);
    state.finished(&id(1), done([]), now);
    assert_eq!(ids(&state.due(now)), ["id1"]);
    state.finished(&id(1), done([]), now);
    assert_eq!(state.due(now), Due::default());
}

fn started(uid: &str, inject: Option<&str>, n: u32) -> Started {
    let sandbox = Pod { containers: Vec::new(), ..pod(uid, inject, [None, None]) };
    Started { pod: sandbox, name: "a".into(), id: id(n), pid: Some(42) }
}

#[test]
fn a_start_is_decided_before_anything_is_listed_and_the_watch_corrects_it() {
    let now = Instant::now();
    let mut state = State::new(false, true, false);
    state.update(Update::Started(started("in", Some("true"), 1), Trigger::Nri), now);
    state.update(Update::Started(started("silent", None, 2), Trigger::Nri), now);
    state.update(Update::Started(started("out", Some("false"), 3), Trigger::Nri), now);
    assert!(state.pending(&id(1)) && !state.pending(&id(2)) && !state.pending(&id(3)));
    assert!(state.due(now).find_lxcfs);
    state.lxcfs_found(Ok(()), now);
    let due = state.due(now);
    assert_eq!(ids(&due), ["id1"]);
    assert_eq!((due.start[0].wish, due.start[0].pid), (Wish::Add(FileSet::ALL), Some(42)));
    state.finished(&id(1), done([Step::Inject(ViewFile::Meminfo)]), now + Duration::from_millis(3));
    assert!(!state.pending(&id(1)));
    assert_eq!(state.take_latencies(), [(Trigger::Nri, Duration::from_millis(3))]);
    // Its annotation was changed since its sandbox was made.
    state.update(Update::Namespaces(Vec::new()), now);
    state.update(Update::Pods(vec![pod("in", Some("false"), [Some(1), None])]), now);
    let due = state.due(now);
    assert_eq!((ids(&due), due.start[0].wish), (vec!["id1".to_owned()], Wish::Nothing));
}

#[test]
fn one_start_is_one_operation_and_one_event_whoever_tells_of_it() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [None, None])]);
    state.update(Update::Started(started("p", Some("true"), 1), Trigger::Cri), now);
    state.due(now);
    state.lxcfs_found(Ok(()), now);
    assert_eq!(ids(&state.due(now)), ["id1"]);
    state.update(Update::Started(started("p", Some("true"), 1), Trigger::Nri), now);
    state.finished(&id(1), done([Step::Inject(ViewFile::Meminfo)]), now);
    state.update(Update::Pod(pod("p", Some("true"), [Some(1), None])), now);
    let running = vec![started("p", Some("true"), 1)];
    state.update(Update::Running { running, by: Trigger::Cri, asked: now }, now);
    assert_eq!(state.due(now), Due::default());
    assert_eq!(state.take_events().len(), 1);
    assert_eq!(state.take_latencies().len(), 1);
}

#[test]
fn what_has_ended_before_the_watch_told_of_it_is_forgotten() {
    let now = Instant::now();
    let mut state = listed(Vec::new());
    for n in 1..=3 {
        state.update(Update::Started(started("p", Some("true"), n), Trigger::Nri), now);
    }
    state.update(Update::Ended(id(1)), now);
    // A list from before the start says nothing of it; the one after it does.
    let list = |asked| Update::Running { running: vec![started("p", Some("true"), 3)], by: Trigger::Nri, asked };
    state.update(list(now), now);
    assert_eq!(state.early.len(), 2);
    state.update(list(now + Duration::from_millis(1)), now);
    assert_eq!(state.early.len(), 1);
    state.due(now);
    state.lxcfs_found(Ok(()), now);
    assert_eq!(ids(&state.due(now)), ["id3"]);
    state.finished(&id(3), Finished::Later, now);
    state.update(Update::Ended(id(3)), now);
    assert_eq!(state.next(), None);
    assert!(state.pods.is_empty() && state.containers.is_empty() && state.early.is_empty());
}

/// What can happen, in any order.
#[derive(Clone, Debug)]
enum Happens {
    Annotate(usize, Option<&'static str>),
    Label(Option<&'static str>),
    /// The watch alone tells.
    Restart(usize, usize),
    /// The runtime tells, and the watch does not yet.
    Starts(usize, usize, Trigger),
    /// The watch tells of a pod.
    Told(usize),
    /// The runtime tells of all.
    Listed,
    Stop(usize, usize),
    Delete(usize),
    Relist,
    Found(bool),
    Changed,
    Sweep,
    Swept,
    Ends(usize, How),
    Passes(u64),
}

#[derive(Clone, Copy, Debug)]
enum How {
    Done,
    Failed,
    Hangs,
    Later,
}

fn happens() -> impl Strategy<Value = Happens> {
    let says = || proptest::sample::select(vec![None, Some("true"), Some("false"), Some("rubbish")]);
    let how = proptest::sample::select(vec![How::Done, How::Done, How::Failed, How::Hangs, How::Later]);
    prop_oneof![
        3 => (0..3usize, says()).prop_map(|(pod, says)| Happens::Annotate(pod, says)),
        1 => says().prop_map(Happens::Label),
        2 => (0..3usize, 0..2usize).prop_map(|(pod, c)| Happens::Restart(pod, c)),
        3 => (0..3usize, 0..2usize, any::<bool>()).prop_map(|(pod, c, nri)| {
            Happens::Starts(pod, c, if nri { Trigger::Nri } else { Trigger::Cri })
        }),
        2 => (0..3usize).prop_map(Happens::Told),
        1 => Just(Happens::Listed),
        1 => (0..3usize, 0..2usize).prop_map(|(pod, c)| Happens::Stop(pod, c)),
        1 => (0..3usize).prop_map(Happens::Delete),
        1 => Just(Happens::Relist),
        3 => any::<bool>().prop_map(Happens::Found),
        1 => Just(Happens::Changed),
        1 => Just(Happens::Sweep),
        1 => Just(Happens::Swept),
        6 => (0..8usize, how).prop_map(|(n, how)| Happens::Ends(n, how)),
        2 => (0..3000u64).prop_map(Happens::Passes),
    ]
}

/// A node as the agent's loop meets it: containers with views, operations on their way, an lxcfs with generations.
struct Node {
    state: State,
    now: Instant,
    pods: [Option<Pod>; 3],
    label: Option<&'static str>,
    ids: u32,
    /// The lxcfs and the files of each view.
    views: HashMap<ContainerId, (u32, FileSet)>,
    running: Vec<(Start, u32)>,
    generation: u32,
    finding: bool,
    serves: bool,
    sweeps: usize,
}

impl Node {
    fn new() -> Node {
        let mut node = Node {
            state: State::new(false, true, false),
            now: Instant::now(),
            pods: [None, None, None],
            label: None,
            ids: 0,
            views: HashMap::new(),
            running: Vec::new(),
            generation: 0,
            finding: false,
            serves: false,
            sweeps: 0,
        };
        node.state.update(Update::Namespaces(Vec::new()), Instant::now());
        node.relist();
        node
    }

    fn relist(&mut self) {
        self.state.update(Update::Pods(self.pods.iter().flatten().cloned().collect()), self.now);
    }

    /// Changes a pod, which is made if it is not there, and tells it.
    fn change(&mut self, n: usize, change: impl FnOnce(&mut Pod)) {
        let uid = format!("{n}-{}", self.ids);
        let pod = self.pods[n].get_or_insert_with(|| pod(&uid, None, [None, None]));
        change(pod);
        self.state.update(Update::Pod(pod.clone()), self.now);
    }

    fn happens(&mut self, what: &Happens) {
        match *what {
            Happens::Annotate(n, says) => self.change(n, |pod| pod.annotations.inject = says.map(Into::into)),
            Happens::Label(says) => {
                self.label = says;
                let update = match says {
                    Some(says) => Update::Namespace(Namespace { name: "ns".into(), label: says.into() }),
                    None => Update::NamespaceGone("ns".into()),
                };
                self.state.update(update, self.now);
            }
            Happens::Restart(n, c) => {
                self.ids += 1;
                let new = id(self.ids);
                self.change(n, |pod| pod.containers[c].id = Some(new));
            }
            Happens::Starts(n, c, trigger) => {
                self.ids += 1;
                let new = id(self.ids);
                let uid = format!("{n}-{}", self.ids);
                let pod = self.pods[n].get_or_insert_with(|| pod(&uid, None, [None, None]));
                pod.containers[c].id = Some(new.clone());
                let sandbox = Pod { containers: Vec::new(), ..pod.clone() };
                let started = Started { pod: sandbox, name: NAMES[c].into(), id: new, pid: Some(7) };
                self.state.update(Update::Started(started.clone(), trigger), self.now);
                // Others tell of it too.
                self.state.update(Update::Started(started, Trigger::Cri), self.now);
            }
            Happens::Told(n) => self.change(n, |_| ()),
            Happens::Stop(n, c) => {
                if let Some(Pod { containers, .. }) = &mut self.pods[n]
                    && let Some(id) = containers[c].id.take()
                {
                    self.state.update(Update::Ended(id), self.now);
                }
            }
            Happens::Listed => {
                let running = self.pods.iter().flatten().flat_map(|pod| {
                    let sandbox = Pod { containers: Vec::new(), ..pod.clone() };
                    pod.containers.iter().filter_map(move |c| {
                        let (pod, name) = (sandbox.clone(), c.name.clone());
                        Some(Started { pod, name, id: c.id.clone()?, pid: None })
                    })
                });
                let running = running.collect();
                // Asked for after whatever came before.
                let asked = self.now + Duration::from_nanos(1);
                self.state.update(Update::Running { running, by: Trigger::Nri, asked }, self.now);
            }
            Happens::Delete(n) => {
                self.ids += 1;
                if let Some(pod) = self.pods[n].take() {
                    self.state.update(Update::PodGone(pod.uid), self.now);
                }
            }
            Happens::Relist => self.relist(),
            Happens::Found(found) => self.found(found),
            Happens::Changed => {
                self.generation += 1;
                self.serves = false;
                self.finding = false;
                self.state.lxcfs_changed();
            }
            Happens::Sweep => {
                self.sweeps += 1;
                self.state.sweeps();
            }
            Happens::Swept if self.sweeps > 0 => {
                self.sweeps -= 1;
                self.state.swept();
            }
            Happens::Ends(n, how) if !self.running.is_empty() => self.ends(n % self.running.len(), how),
            Happens::Passes(ms) => self.now += Duration::from_millis(ms),
            Happens::Swept | Happens::Ends(..) => {}
        }
        self.turn();
    }

    fn found(&mut self, found: bool) {
        if std::mem::take(&mut self.finding) {
            self.serves = found;
            self.state.lxcfs_found(if found { Ok(()) } else { Err("away".into()) }, self.now);
        }
    }

    fn ends(&mut self, n: usize, how: How) {
        let (Start { id, wish, .. }, generation) = self.running[n].clone();
        let finished = match how {
            How::Done => {
                match wish {
                    Wish::Files(files) | Wish::Add(files) => drop(self.views.insert(id.clone(), (generation, files))),
                    _ => drop(self.views.remove(&id)),
                }
                done([])
            }
            How::Failed => Finished::Failed { done: Vec::new(), why: "no".into() },
            How::Hangs => return self.state.finished(&id, Finished::Hangs { why: "hangs".into() }, self.now),
            How::Later => Finished::Later,
        };
        self.running.remove(n);
        self.state.finished(&id, finished, self.now);
    }

    /// What the agent's loop does between two things that happen.
    fn turn(&mut self) {
        let due = self.state.due(self.now);
        if due.find_lxcfs {
            assert!(!self.finding, "it is looked for once at a time");
            self.finding = true;
        }
        for start in due.start {
            assert!(self.running.iter().all(|(running, _)| running.id != start.id), "two operations on {}", start.id);
            assert_ne!(start.wish, Wish::Keep);
            assert!(start.wish == Wish::Nothing || (self.serves && self.sweeps == 0), "{start:?} without an lxcfs");
            self.running.push((start, self.generation));
        }
        if self.state.running() == 0 && self.serves {
            self.serves = false;
            self.state.lxcfs_released();
        }
        assert!(self.state.next().is_none_or(|at| at > self.now), "the loop would spin");
        assert_eq!(self.state.running(), self.running.len());
    }

    /// Lets everything that is on its way come to its end, and the runtime and then the watch tell of everything.
    fn settles(&mut self) {
        self.happens(&Happens::Listed);
        self.happens(&Happens::Relist);
        while self.sweeps > 0 {
            self.happens(&Happens::Swept);
        }
        for _ in 0..1000 {
            if self.finding {
                self.found(true);
            } else if !self.running.is_empty() {
                self.ends(0, How::Done);
            } else if let Some(at) = self.state.next() {
                self.now = at;
            } else {
                return;
            }
            self.turn();
        }
        panic!("it does not come to rest");
    }

    fn is_as_wished(&self) {
        for pod in self.pods.iter().flatten() {
            let wishes = policy::wishes(&pod.annotations, self.label, false, &NAMES);
            for container in &pod.containers {
                let Some(id) = &container.id else { continue };
                let view = self.views.get(id);
                match wishes.by_container[&container.name] {
                    Wish::Files(files) => assert_eq!(view, Some(&(self.generation, files)), "{id}"),
                    Wish::Nothing => assert_eq!(view, None, "{id}"),
                    _ => {}
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_comes_in_between_the_last_wish_wins(all in proptest::collection::vec(happens(), 0..60)) {
        let mut node = Node::new();
        all.iter().for_each(|what| node.happens(what));
        node.settles();
        node.is_as_wished();
        prop_assert!(node.state.early.is_empty(), "{:?}", node.state.early);
    }
}
