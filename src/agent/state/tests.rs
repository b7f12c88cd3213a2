//! The state machine alone, and against a model: after any sequence of inputs, every container has
//! its last desired view.

use proptest::{collection::vec, prelude::*};

use super::{
    lxcfs::{LXCFS_RETRY, REPORT_AFTER},
    *,
};
use crate::{
    model::{
        pod::{self, Annotations, Namespace},
        status::ContainerState,
        view::{FileSet, ViewFile},
    },
    plan::{SkipReason, Step},
    sys::mountinfo::MountId,
};

const NAMES: [&str; 2] = ["a", "b"];

fn id(n: u32) -> ContainerId {
    ContainerId::new(&format!("id{n}")).unwrap()
}

fn pod(uid: &str, inject: Option<&str>, ids: [Option<u32>; 2]) -> Pod {
    let containers = NAMES.iter().zip(ids).map(|(name, n)| pod::Container {
        name: (*name).into(),
        id: n.map(id),
        nests_containers: false,
    });
    Pod {
        uid: uid.into(),
        namespace: "ns".into(),
        name: uid.into(),
        annotations: Annotations { inject: inject.map(Into::into), ..Annotations::default() },
        labels: Labels::new(),
        containers: containers.collect(),
    }
}

/// The namespace of all pods, with the label.
fn labelled(value: &str) -> Namespace {
    let label = (pod::INJECT_KEY.to_owned(), value.to_owned());
    Namespace { name: "ns".into(), labels: [label].into() }
}

fn by_default() -> Scope {
    Scope { inject_by_default: true, ..Scope::default() }
}

fn listed(pods: Vec<Pod>) -> State {
    let mut state = State::new(StateConfig { has_namespaces: true, ..StateConfig::default() });
    state.update(Update::NamespacesReplaced(Vec::new()), Instant::now());
    state.update(Update::PodsReplaced(pods), Instant::now());
    state
}

fn done(steps: impl IntoIterator<Item = Step>) -> Completion {
    let done: Vec<Step> = steps.into_iter().collect();
    Completion::Applied { done, skipped: Vec::new(), view: FileSet::ALL }
}

fn ids(operations: &[Operation]) -> Vec<String> {
    let mut ids: Vec<String> = operations.iter().map(|o| o.id.to_string()).collect();
    ids.sort();
    ids
}

#[test]
fn invalid_label_is_reported_once_on_its_namespace() {
    let now = Instant::now();
    let pods = ["p", "q"].into_iter().zip([1, 2]);
    let mut state = listed(pods.map(|(name, id)| pod(name, None, [Some(id), None])).collect());
    let label = |state: &mut State, value: &str| {
        state.update(Update::NamespaceApplied(labelled(value)), now);
        state.take_namespace_events().into_iter().map(|e| e.value).collect::<Vec<_>>()
    };
    assert_eq!(label(&mut state, "yes"), ["yes"]);
    state.update(Update::PodApplied(pod("r", None, [Some(3), None])), now);
    assert_eq!(state.take_namespace_events(), []);
    assert_eq!(state.take_events(), [], "not on the pods");
    assert_eq!(label(&mut state, "no"), ["no"]);
    assert_eq!(label(&mut state, "true"), [""; 0]);
    assert_eq!(label(&mut state, "no"), ["no"]);
}

#[test]
fn decisions_wait_for_pods_and_namespaces() {
    let now = Instant::now();
    let mut state = State::new(StateConfig { has_namespaces: true, ..StateConfig::default() });
    state.update(Update::PodsReplaced(vec![pod("p", None, [Some(1), None])]), Instant::now());
    assert_eq!(state.poll_operations(now), []);
    state.update(Update::NamespacesReplaced(vec![labelled("true")]), Instant::now());
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
}

#[test]
fn changed_labels_of_pod_and_namespace_take_effect() {
    let now = Instant::now();
    let scope = Scope {
        pod_selector: Some("app=web".parse().unwrap()),
        namespace_selector: Some("team".parse().unwrap()),
        ..Scope::default()
    };
    let config = StateConfig { scope, has_namespaces: true, ..StateConfig::default() };
    let mut state = State::new(config);
    state.update(Update::NamespacesReplaced(Vec::new()), now);
    let with = |labels: &[(&str, &str)]| Pod {
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..pod("p", None, [Some(1), None])
    };
    let desired = |state: &State| state.containers.get(&id(1)).unwrap().desired;
    let all = DesiredView::Exactly(FileSet::ALL);
    // Over NRI, before the watch.
    let sandbox = Pod { containers: Vec::new(), ..with(&[("app", "web")]) };
    let start = StartedContainer { pod: sandbox, ..started("p", None, 1) };
    state.update(Update::ContainerStarted(start, Trigger::Nri), now);
    assert_eq!(desired(&state), DesiredView::AtLeast(FileSet::ALL));
    state.update(Update::PodsReplaced(vec![with(&[("app", "web")])]), now);
    assert_eq!(desired(&state), all);
    state.update(Update::PodApplied(with(&[("app", "db")])), now);
    assert_eq!(desired(&state), DesiredView::Absent);
    let labels = [("team".to_owned(), "a".to_owned())].into();
    let namespace = Namespace { name: "ns".into(), labels };
    state.update(Update::NamespaceApplied(namespace), now);
    assert_eq!(desired(&state), all);
    state.update(Update::NamespaceDeleted("ns".into()), now);
    assert_eq!(desired(&state), DesiredView::Absent);
}

#[test]
fn last_desired_view_wins_with_one_event_per_reason() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), Some(2)])]);
    assert_eq!(ids(&state.poll_operations(now)), ["id1", "id2"]);
    state.completed(&id(1), done([Step::Inject(ViewFile::Meminfo)]), now);
    assert_eq!(state.take_events(), [], "the other container is in flight");
    // The pod opts out while the second operation is in flight: the next one starts after it.
    state.update(Update::PodApplied(pod("p", Some("false"), [Some(1), Some(2)])), Instant::now());
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    state.completed(&id(1), done([remove(ViewFile::Meminfo)]), now);
    state.completed(&id(2), done([Step::Inject(ViewFile::Meminfo)]), now);
    let events = state.take_events();
    let reasons: Vec<Reason> = events.iter().map(|e| e.reason).collect();
    assert_eq!(reasons, [Reason::LxcfsInjected, Reason::LxcfsRemoved]);
    assert_eq!(events[0].note, "injected view files into a: meminfo; b: meminfo");
    assert_eq!(ids(&state.poll_operations(now)), ["id2"]);
    state.completed(&id(2), done([remove(ViewFile::Meminfo)]), now);
    assert_eq!(state.poll_operations(now), []);
    assert_eq!(state.poll_timeout(), None);
}

#[test]
fn opt_outs_proceed_without_lxcfs() {
    let now = Instant::now();
    let mut state = listed(vec![
        pod("in", Some("true"), [Some(1), None]),
        pod("out", Some("false"), [Some(2), None]),
    ]);
    state.sweep_started();
    assert_eq!(ids(&state.poll_operations(now)), ["id2"]);
    assert_eq!(state.poll_timeout(), None, "the end of the sweep is an input");
    state.sweep_finished();
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    assert!(state.lxcfs_searched(false, now), "the first failure");
    state.completed(&id(1), Completion::NoLxcfs, now);
    assert_eq!(state.poll_operations(now), []);
    assert_eq!(state.poll_timeout(), Some(now + LXCFS_RETRY.first));
    // A failed operation that is due waits for lxcfs too, and does not make the loop spin.
    state.completed(&id(2), Completion::Failed { done: Vec::new(), why: "no".into() }, now);
    let later = now + LXCFS_RETRY.first;
    let operations = state.poll_operations(later);
    assert_eq!(ids(&operations), ["id1", "id2"]);
    let with_lxcfs = |o: &Operation| o.with_lxcfs == (o.id == id(1));
    assert!(operations.iter().all(with_lxcfs), "{operations:?}");
    assert_eq!(state.poll_timeout(), None);
}

#[test]
fn missing_lxcfs_is_reported_once_after_30_seconds() {
    let started = Instant::now();
    let mut now = started;
    let mut state = listed(vec![
        pod("p", Some("true"), [Some(1), Some(2)]),
        pod("out", Some("false"), [Some(3), None]),
    ]);
    assert_eq!(ids(&state.poll_operations(now)), ["id1", "id2", "id3"]);
    state.completed(&id(3), done([]), now);
    let mut reported = Vec::new();
    for failure in 1..10 {
        // One operation searches, the other shares the result.
        assert_eq!(state.lxcfs_searched(false, now), failure == 1);
        assert!(!state.is_pending(&id(1)), "no start waits for an absent lxcfs");
        for n in [1, 2] {
            state.completed(&id(n), Completion::NoLxcfs, now);
        }
        reported.extend(state.take_events().into_iter().map(|e| (now - started, e.note)));
        now = state.poll_timeout().unwrap();
        assert_eq!(ids(&state.poll_operations(now)), ["id1", "id2"]);
    }
    let [(after, note)] = &reported[..] else { panic!("{reported:?}") };
    assert!((REPORT_AFTER..REPORT_AFTER * 2).contains(after), "{after:?}");
    // The pod's owner cannot start lxcfs.
    assert!(note.starts_with("a: no lxcfs serves on this node") && !note.contains("--"), "{note}");
    assert!(!state.lxcfs_searched(true, now));
    for n in [1, 2] {
        state.completed(&id(n), done([Step::Inject(ViewFile::Meminfo)]), now);
    }
    let events = state.take_events();
    assert!(!events.is_empty() && events.iter().all(|e| e.reason == Reason::LxcfsInjected));
}

#[test]
fn restart_of_lxcfs_creates_no_warning() {
    let started = Instant::now();
    let mut now = started;
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), None])]);
    // It exits, is unmounted, and serves again after 25 s. Each restart has its own 30 s.
    for _ in 0..3 {
        state.lxcfs_changed(None);
        let serves_at = now + Duration::from_secs(25);
        while now < serves_at {
            assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
            state.lxcfs_searched(false, now);
            state.completed(&id(1), Completion::NoLxcfs, now);
            now = state.poll_timeout().unwrap().min(serves_at);
        }
        state.lxcfs_changed(None);
        assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
        state.lxcfs_searched(true, now);
        state.completed(
            &id(1),
            done([Step::Remount { file: ViewFile::Meminfo, mount: MountId(7) }]),
            now,
        );
    }
    assert!(state.take_events().iter().all(|e| e.reason == Reason::LxcfsRemounted));
    // An lxcfs that is mounted but never serves is missing from its first failed search on.
    for _ in 0..40 {
        state.lxcfs_changed(None);
        assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
        state.lxcfs_searched(false, now);
        state.completed(&id(1), Completion::NoLxcfs, now);
        now += Duration::from_secs(1);
    }
    let reasons: Vec<Reason> = state.take_events().iter().map(|e| e.reason).collect();
    assert_eq!(reasons, [Reason::LxcfsInjectFailed]);
}

#[test]
fn supervisor_has_time_to_remount_the_views() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), None])]);
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    state.completed(&id(1), done([Step::Inject(ViewFile::Meminfo)]), now);
    assert!(state.is_idle());
    // It exits, and another serves.
    let recovered = now + Duration::from_secs(2);
    state.lxcfs_changed(Some(recovered));
    state.lxcfs_changed(None);
    assert_eq!(ids(&state.poll_operations(now)), Vec::<&str>::new());
    assert!(!state.is_idle(), "its view may be of the exited one");
    assert_eq!(state.poll_timeout(), Some(recovered));
    // What has no view does not wait, nor does an opt-out.
    state.update(Update::PodApplied(pod("q", Some("true"), [Some(2), None])), now);
    assert_eq!(ids(&state.poll_operations(now)), ["id2"]);
    state.update(Update::PodApplied(pod("p", Some("false"), [Some(1), None])), now);
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    state.completed(&id(1), done([]), now);
    state.completed(&id(2), done([]), now);
    // An operation in flight may mount from the exited one: another one follows it.
    state.lxcfs_changed(None);
    assert_eq!(ids(&state.poll_operations(now)), ["id2"]);
    state.lxcfs_changed(Some(recovered));
    state.completed(&id(2), done([]), now);
    assert_eq!(ids(&state.poll_operations(now)), ["id2"]);
}

#[test]
fn outdated_missing_lxcfs_is_no_outage() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), None])]);
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    state.lxcfs_changed(None);
    state.completed(&id(1), Completion::NoLxcfs, now);
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    assert!(state.is_pending(&id(1)));
    // It exits while view files are mounted from it: the failure of the next operation counts.
    let failed = || Completion::Failed { done: Vec::new(), why: "ENOTCONN".into() };
    state.lxcfs_changed(None);
    state.completed(&id(1), failed(), now);
    assert_eq!(state.take_events(), []);
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    state.completed(&id(1), failed(), now);
    assert_eq!(state.take_events().len(), 1);
}

#[test]
fn nesting_container_is_skipped_with_one_event() {
    let now = Instant::now();
    let nesting = |inject| {
        let mut pod = pod("p", inject, [Some(1), Some(2)]);
        pod.containers[1].nests_containers = true;
        pod
    };
    let mut state = State::new(StateConfig { scope: by_default(), ..StateConfig::default() });
    // The runtime reports the start without the spec, which the watch then adds.
    let of_b = StartedContainer { name: "b".into(), ..started("p", None, 2) };
    state.update(Update::ContainerStarted(of_b, Trigger::Nri), now);
    assert_eq!(ids(&state.poll_operations(now)), ["id2"]);
    state.completed(&id(2), done([Step::Inject(ViewFile::Meminfo)]), now);
    state.take_events();
    state.update(Update::PodsReplaced(vec![nesting(None)]), now);
    let mut operations = state.poll_operations(now);
    operations.sort_by(|a, b| a.id.cmp(&b.id));
    let desired: Vec<DesiredView> = operations.iter().map(|o| o.desired).collect();
    assert_eq!(desired, [DesiredView::Exactly(FileSet::ALL), DesiredView::Absent]);
    state.update(Update::PodApplied(nesting(None)), now);
    let events = state.take_events();
    assert_eq!(events.len(), 1);
    // Its owner may request a view, so it is not unsupported.
    assert_eq!(events[0].reason, Reason::LxcfsInjectFailed);
    let note = &events[0].note;
    assert!(note.starts_with("b: ") && note.contains("kube-lxcfs.io/inject: \"true\""), "{note}");
    // Its owner requests it.
    state.completed(&id(2), done([remove(ViewFile::Meminfo)]), now);
    state.take_events();
    state.update(Update::PodApplied(nesting(Some("true"))), now);
    let operations = state.poll_operations(now);
    assert_eq!(ids(&operations), ["id2"]);
    assert_eq!(operations[0].desired, DesiredView::Exactly(FileSet::ALL));
    assert_eq!(state.take_events(), []);
}

#[test]
fn container_without_any_view_file_is_skipped() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), None])]);
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    // Of an lxcfs that serves these two.
    let skipped = [ViewFile::Meminfo, ViewFile::Uptime].map(|f| (f, SkipReason::PathOccupied));
    let (done, skipped) = (Vec::new(), skipped.to_vec());
    state.completed(&id(1), Completion::Applied { done, skipped, view: FileSet::NONE }, now);
    let events = state.take_events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].reason, Reason::LxcfsInjectFailed);
    assert!(events[0].note.contains("meminfo (another mount is on its path)"), "{events:?}");
    assert_eq!(state.snapshot()[0].desired.state, ContainerState::Skipped);
}

#[test]
fn containers_without_cpu_follow_a_read_only_lxcfs() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), Some(2)])]);
    assert_eq!(ids(&state.poll_operations(now)), ["id1", "id2"]);
    let mut without_cpu = done([Step::Inject(ViewFile::Meminfo)]);
    if let Completion::Applied { skipped, .. } = &mut without_cpu {
        skipped.push((ViewFile::Cpu, SkipReason::WritableLxcfs));
    }
    state.completed(&id(1), without_cpu.clone(), now);
    state.completed(&id(2), done([Step::Inject(ViewFile::Cpu)]), now);
    assert_eq!(state.take_events().len(), 1);
    assert_eq!(state.poll_operations(now), []);
    state.lxcfs_read_only();
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    // It opened the files of lxcfs before.
    state.lxcfs_read_only();
    if let Completion::Applied { done, .. } = &mut without_cpu {
        done.clear();
    }
    state.completed(&id(1), without_cpu, now);
    assert_eq!(state.take_events(), [], "a retry creates no event");
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    state.completed(&id(1), done([Step::Inject(ViewFile::Cpu)]), now);
    assert_eq!(state.take_events().len(), 1);
    state.lxcfs_read_only();
    assert_eq!(state.poll_operations(now), []);
}

#[test]
fn repeated_warning_is_reported_once() {
    let mut now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [Some(1), None])]);
    for (why, events) in [("no", 1), ("no", 0), ("other", 1)] {
        assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
        state.completed(&id(1), Completion::Failed { done: Vec::new(), why: why.into() }, now);
        assert_eq!(state.take_events().len(), events, "{why}");
        now = state.poll_timeout().unwrap();
    }
}

#[test]
fn adoption_repeats_an_operation_without_lxcfs() {
    let now = Instant::now();
    let mut state = State::new(StateConfig { adopt: true, ..StateConfig::default() });
    state.update(Update::PodsReplaced(vec![pod("p", None, [Some(1), None])]), Instant::now());
    let with_lxcfs = |operations: Vec<Operation>| {
        assert_eq!(ids(&operations), ["id1"]);
        operations[0].with_lxcfs
    };
    assert!(with_lxcfs(state.poll_operations(now)));
    state.lxcfs_searched(false, now);
    state.completed(&id(1), Completion::NoLxcfs, now);
    // A removal does not wait for lxcfs. Adoption does.
    assert!(!with_lxcfs(state.poll_operations(now)));
    state.completed(&id(1), done([]), now);
    assert_eq!(state.poll_operations(now), []);
    let later = state.poll_timeout().unwrap();
    assert!(with_lxcfs(state.poll_operations(later)));
    state.lxcfs_searched(true, later);
    state.completed(&id(1), done([]), later);
    assert_eq!(state.poll_operations(later), []);
    assert_eq!(state.poll_timeout(), None);
}

fn remove(file: ViewFile) -> Step {
    Step::Remove { file, mount: MountId(7) }
}

fn started(uid: &str, inject: Option<&str>, n: u32) -> StartedContainer {
    let sandbox = Pod { containers: Vec::new(), ..pod(uid, inject, [None, None]) };
    StartedContainer { pod: sandbox, name: "a".into(), id: id(n), pid: Some(42) }
}

#[test]
fn start_is_decided_before_lists_and_watch_corrects() {
    let now = Instant::now();
    let mut state = State::new(StateConfig { has_namespaces: true, ..StateConfig::default() });
    state.update(Update::ContainerStarted(started("in", Some("true"), 1), Trigger::Nri), now);
    state.update(Update::ContainerStarted(started("silent", None, 2), Trigger::Nri), now);
    state.update(Update::ContainerStarted(started("out", Some("false"), 3), Trigger::Nri), now);
    assert!(state.is_pending(&id(1)) && !state.is_pending(&id(2)) && !state.is_pending(&id(3)));
    let operations = state.poll_operations(now);
    assert_eq!(ids(&operations), ["id1"]);
    assert_eq!(
        (operations[0].desired, operations[0].pid),
        (DesiredView::AtLeast(FileSet::ALL), Some(42))
    );
    state.completed(
        &id(1),
        done([Step::Inject(ViewFile::Meminfo)]),
        now + Duration::from_millis(3),
    );
    assert!(!state.is_pending(&id(1)));
    assert_eq!(state.take_latencies(), [(Trigger::Nri, Duration::from_millis(3))]);
    // Its annotation was changed after its sandbox was created.
    state.update(Update::NamespacesReplaced(Vec::new()), now);
    state.update(Update::PodsReplaced(vec![pod("in", Some("false"), [Some(1), None])]), now);
    let operations = state.poll_operations(now);
    assert_eq!(
        (ids(&operations), operations[0].desired),
        (vec!["id1".to_owned()], DesiredView::Absent)
    );
}

#[test]
fn start_from_many_sources_is_one_operation() {
    let now = Instant::now();
    let mut state = listed(vec![pod("p", Some("true"), [None, None])]);
    state.update(Update::ContainerStarted(started("p", Some("true"), 1), Trigger::Cri), now);
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    state.update(Update::ContainerStarted(started("p", Some("true"), 1), Trigger::Nri), now);
    state.completed(&id(1), done([Step::Inject(ViewFile::Meminfo)]), now);
    state.update(Update::PodApplied(pod("p", Some("true"), [Some(1), None])), now);
    let running = vec![started("p", Some("true"), 1)];
    state.update(
        Update::ContainersListed { containers: running, trigger: Trigger::Cri, requested_at: now },
        now,
    );
    assert_eq!(state.poll_operations(now), []);
    assert_eq!(state.take_events().len(), 1);
    assert_eq!(state.take_latencies().len(), 1);
}

#[test]
fn start_stays_pending_when_an_earlier_look_up_fails() {
    let now = Instant::now();
    let mut state = listed(Vec::new());
    // CRI lists the container when it is created. Its process is known from its start on.
    let created = StartedContainer { pid: None, ..started("p", Some("true"), 1) };
    state.update(Update::ContainerStarted(created, Trigger::Cri), now);
    assert_eq!(state.poll_operations(now)[0].pid, None);
    state.update(Update::ContainerStarted(started("p", Some("true"), 1), Trigger::Nri), now);
    state.completed(&id(1), Completion::NotRunning, now);
    assert!(state.is_pending(&id(1)), "the start waits for its view");
    assert_eq!(state.poll_operations(now)[0].pid, Some(42));
}

#[test]
fn resync_queues_every_container_once() {
    let now = Instant::now();
    let pods = (0..20).map(|n| pod(&format!("p{n}"), Some("true"), [Some(2 * n), Some(2 * n + 1)]));
    let mut state = listed(pods.collect());
    let turn = |state: &mut State| {
        let operations = state.poll_operations(now);
        for operation in &operations {
            state.completed(&operation.id, done([]), now);
        }
        ids(&operations)
    };
    let all = turn(&mut state);
    assert_eq!(all.len(), 40);
    let mut queued = Vec::new();
    for part in 0..4 {
        assert_eq!(turn(&mut state), [""; 0]);
        state.resync(part, 4);
        let of_part = turn(&mut state);
        assert!(of_part.len() < all.len());
        queued.extend(of_part);
    }
    queued.sort();
    assert_eq!(queued, all);
}

#[test]
fn late_start_is_reported_to_the_owner() {
    let now = Instant::now();
    let mut state = listed(Vec::new());
    for (uid, inject, n) in [("in", "true", 1), ("out", "false", 2)] {
        state.update(Update::ContainerStarted(started(uid, Some(inject), n), Trigger::Nri), now);
    }
    assert_eq!(ids(&state.poll_operations(now)), ["id1"]);
    assert!(state.start_timed_out(&id(1)));
    assert!(!state.start_timed_out(&id(2)) && !state.start_timed_out(&id(3)));
    assert_eq!(state.take_events(), [], "one event with the view's");
    state.completed(&id(1), done([Step::Inject(ViewFile::Meminfo)]), now);
    let events = state.take_events();
    let reasons: Vec<Reason> = events.iter().map(|e| e.reason).collect();
    assert_eq!(reasons, [Reason::LxcfsInjected, Reason::LxcfsInjectFailed]);
    assert!(events[1].note.starts_with("a: started before its view"), "{}", events[1].note);
    // The plugin released it just before the loop.
    assert!(state.start_timed_out(&id(1)));
    assert_eq!(state.take_events().len(), 1);
    // An lxcfs that restarts is no failure of the start.
    state.lxcfs_searched(false, now);
    assert!(!state.start_timed_out(&id(1)));
}

#[test]
fn container_stopped_before_the_watch_is_removed() {
    let now = Instant::now();
    let mut state = listed(Vec::new());
    for n in 1..=3 {
        state.update(Update::ContainerStarted(started("p", Some("true"), n), Trigger::Nri), now);
    }
    state.update(Update::ContainerStopped(id(1)), now);
    // A list from before the start cannot contain it. The one after it can.
    let list = |requested_at| Update::ContainersListed {
        containers: vec![started("p", Some("true"), 3)],
        trigger: Trigger::Nri,
        requested_at,
    };
    state.update(list(now), now);
    assert_eq!(state.unconfirmed.len(), 2);
    state.update(list(now + Duration::from_millis(1)), now);
    assert_eq!(state.unconfirmed.len(), 1);
    assert_eq!(ids(&state.poll_operations(now)), ["id3"]);
    state.completed(&id(3), Completion::NotRunning, now);
    state.update(Update::ContainerStopped(id(3)), now);
    assert_eq!(state.poll_timeout(), None);
    assert!(
        state.pods.is_empty()
            && state.containers.iter().next().is_none()
            && state.unconfirmed.is_empty()
    );
}

/// An input, in any order.
#[derive(Clone, Debug)]
enum Input {
    Annotate(usize, Option<&'static str>),
    Label(Option<&'static str>),
    /// Only the watch reports it.
    Restart(usize, usize),
    /// The runtime reports it, the watch not yet.
    Starts(usize, usize, Trigger),
    /// The watch reports a pod.
    Watched(usize),
    /// The runtime lists its containers.
    Listed,
    Stop(usize, usize),
    Delete(usize),
    Relist,
    /// Whether a supervisor remounts the views.
    Changed(bool),
    SweepStarted,
    SweepFinished,
    Completes(usize, How),
    Passes(u64),
}

#[derive(Clone, Copy, Debug)]
enum How {
    Applied,
    Failed,
    TimedOut,
    NotRunning,
    /// Its search failed, or a search that it shared.
    NoLxcfs,
}

fn input() -> impl Strategy<Value = Input> {
    let value =
        || proptest::sample::select(vec![None, Some("true"), Some("false"), Some("rubbish")]);
    let how = proptest::sample::select(vec![
        How::Applied,
        How::Applied,
        How::Failed,
        How::TimedOut,
        How::NotRunning,
        How::NoLxcfs,
    ]);
    prop_oneof![
        3 => (0..3usize, value()).prop_map(|(pod, value)| Input::Annotate(pod, value)),
        1 => value().prop_map(Input::Label),
        2 => (0..3usize, 0..2usize).prop_map(|(pod, c)| Input::Restart(pod, c)),
        3 => (0..3usize, 0..2usize, any::<bool>()).prop_map(|(pod, c, nri)| {
            Input::Starts(pod, c, if nri { Trigger::Nri } else { Trigger::Cri })
        }),
        2 => (0..3usize).prop_map(Input::Watched),
        1 => Just(Input::Listed),
        1 => (0..3usize, 0..2usize).prop_map(|(pod, c)| Input::Stop(pod, c)),
        1 => (0..3usize).prop_map(Input::Delete),
        1 => Just(Input::Relist),
        1 => any::<bool>().prop_map(Input::Changed),
        1 => Just(Input::SweepStarted),
        1 => Just(Input::SweepFinished),
        6 => (0..8usize, how).prop_map(|(n, how)| Input::Completes(n, how)),
        2 => (0..3000u64).prop_map(Input::Passes),
    ]
}

/// A model of a node: containers with views, operations in flight, an lxcfs with generations.
struct Node {
    state: State,
    now: Instant,
    pods: [Option<Pod>; 3],
    label: Option<&'static str>,
    ids: u32,
    /// The lxcfs and the files of each view.
    views: HashMap<ContainerId, (u32, FileSet)>,
    running: Vec<(Operation, u32)>,
    generation: u32,
    sweeps: usize,
}

impl Node {
    fn new() -> Node {
        let mut node = Node {
            state: State::new(StateConfig { has_namespaces: true, ..StateConfig::default() }),
            now: Instant::now(),
            pods: [None, None, None],
            label: None,
            ids: 0,
            views: HashMap::new(),
            running: Vec::new(),
            generation: 0,
            sweeps: 0,
        };
        node.state.update(Update::NamespacesReplaced(Vec::new()), Instant::now());
        node.relist();
        node
    }

    fn relist(&mut self) {
        self.state
            .update(Update::PodsReplaced(self.pods.iter().flatten().cloned().collect()), self.now);
    }

    /// Changes a pod, which is created if it is absent, and reports it.
    fn change(&mut self, n: usize, change: impl FnOnce(&mut Pod)) {
        let uid = format!("{n}-{}", self.ids);
        let pod = self.pods[n].get_or_insert_with(|| pod(&uid, None, [None, None]));
        change(pod);
        self.state.update(Update::PodApplied(pod.clone()), self.now);
    }

    fn apply(&mut self, input: &Input) {
        match *input {
            Input::Annotate(n, value) => {
                self.change(n, |pod| pod.annotations.inject = value.map(Into::into));
            }
            Input::Label(value) => {
                self.label = value;
                let update = match value {
                    Some(value) => Update::NamespaceApplied(labelled(value)),
                    None => Update::NamespaceDeleted("ns".into()),
                };
                self.state.update(update, self.now);
            }
            Input::Restart(n, c) => {
                self.ids += 1;
                let new = id(self.ids);
                self.change(n, |pod| pod.containers[c].id = Some(new));
            }
            Input::Starts(n, c, trigger) => {
                self.ids += 1;
                let new = id(self.ids);
                let uid = format!("{n}-{}", self.ids);
                let pod = self.pods[n].get_or_insert_with(|| pod(&uid, None, [None, None]));
                pod.containers[c].id = Some(new.clone());
                let sandbox = Pod { containers: Vec::new(), ..pod.clone() };
                let started =
                    StartedContainer { pod: sandbox, name: NAMES[c].into(), id: new, pid: Some(7) };
                self.state.update(Update::ContainerStarted(started.clone(), trigger), self.now);
                // Another source reports it too.
                self.state.update(Update::ContainerStarted(started, Trigger::Cri), self.now);
            }
            Input::Watched(n) => self.change(n, |_| ()),
            Input::Stop(n, c) => {
                if let Some(Pod { containers, .. }) = &mut self.pods[n]
                    && let Some(id) = containers[c].id.take()
                {
                    self.state.update(Update::ContainerStopped(id), self.now);
                }
            }
            Input::Listed => {
                let running = self.pods.iter().flatten().flat_map(|pod| {
                    let sandbox = Pod { containers: Vec::new(), ..pod.clone() };
                    pod.containers.iter().filter_map(move |c| {
                        let (pod, name) = (sandbox.clone(), c.name.clone());
                        Some(StartedContainer { pod, name, id: c.id.clone()?, pid: None })
                    })
                });
                let running = running.collect();
                // Requested after all earlier inputs.
                let requested_at = self.now + Duration::from_nanos(1);
                self.state.update(
                    Update::ContainersListed {
                        containers: running,
                        trigger: Trigger::Nri,
                        requested_at,
                    },
                    self.now,
                );
            }
            Input::Delete(n) => {
                self.ids += 1;
                if let Some(pod) = self.pods[n].take() {
                    self.state.update(Update::PodDeleted(pod.uid), self.now);
                }
            }
            Input::Relist => self.relist(),
            Input::Changed(recovers) => {
                self.generation += 1;
                self.state.lxcfs_changed(recovers.then(|| self.now + Duration::from_secs(2)));
            }
            Input::SweepStarted => {
                self.sweeps += 1;
                self.state.sweep_started();
            }
            Input::SweepFinished if self.sweeps > 0 => {
                self.sweeps -= 1;
                self.state.sweep_finished();
            }
            Input::Completes(n, how) if !self.running.is_empty() => {
                self.complete(n % self.running.len(), how);
            }
            Input::Passes(ms) => self.now += Duration::from_millis(ms),
            Input::SweepFinished | Input::Completes(..) => {}
        }
        self.turn();
    }

    fn complete(&mut self, n: usize, how: How) {
        let (Operation { id, desired, with_lxcfs, .. }, generation) = self.running[n].clone();
        let current = generation == self.generation;
        let finished = match how {
            How::NoLxcfs if !with_lxcfs => return,
            How::NoLxcfs => {
                // The loop ignores the result of a search that an earlier lxcfs concerns.
                if current {
                    self.state.lxcfs_searched(false, self.now);
                }
                Completion::NoLxcfs
            }
            How::Applied => {
                if with_lxcfs && current {
                    self.state.lxcfs_searched(true, self.now);
                }
                match desired {
                    DesiredView::Exactly(files) | DesiredView::AtLeast(files) => {
                        self.views.insert(id.clone(), (generation, files));
                    }
                    _ => {
                        self.views.remove(&id);
                    }
                }
                done([])
            }
            How::Failed => Completion::Failed { done: Vec::new(), why: "no".into() },
            How::TimedOut => {
                return self.state.completed(
                    &id,
                    Completion::TimedOut { why: "hangs".into() },
                    self.now,
                );
            }
            How::NotRunning => Completion::NotRunning,
        };
        self.running.remove(n);
        self.state.completed(&id, finished, self.now);
    }

    /// Does the work of the agent's loop between two inputs.
    fn turn(&mut self) {
        for start in self.state.poll_operations(self.now) {
            assert!(
                self.running.iter().all(|(running, _)| running.id != start.id),
                "two operations on {}",
                start.id
            );
            assert_ne!(start.desired, DesiredView::Unmanaged);
            assert!(
                start.desired == DesiredView::Absent || (start.with_lxcfs && self.sweeps == 0),
                "{start:?} without an lxcfs"
            );
            self.running.push((start, self.generation));
        }
        assert!(self.state.poll_timeout().is_none_or(|at| at > self.now), "the loop would spin");
        assert_eq!(self.state.in_flight(), self.running.len());
    }

    /// Completes everything in flight; the runtime and then the watch report everything.
    fn settle(&mut self) {
        self.apply(&Input::Listed);
        self.apply(&Input::Relist);
        while self.sweeps > 0 {
            self.apply(&Input::SweepFinished);
        }
        for _ in 0..1000 {
            if !self.running.is_empty() {
                self.complete(0, How::Applied);
            } else if let Some(at) = self.state.poll_timeout() {
                self.now = at;
            } else {
                return;
            }
            self.turn();
        }
        panic!("it does not become idle");
    }

    fn assert_desired(&self) {
        for pod in self.pods.iter().flatten() {
            let decision = policy::decide(&pod.annotations, self.label, false, &NAMES);
            for container in &pod.containers {
                let Some(id) = &container.id else { continue };
                let view = self.views.get(id);
                match decision.by_container[&container.name] {
                    DesiredView::Exactly(files) => {
                        assert_eq!(view, Some(&(self.generation, files)), "{id}");
                    }
                    DesiredView::Absent => assert_eq!(view, None, "{id}"),
                    _ => {}
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn state_machine_reaches_last_desired_view(inputs in vec(input(), 0..60)) {
        let mut node = Node::new();
        inputs.iter().for_each(|input| node.apply(input));
        node.settle();
        node.assert_desired();
        prop_assert!(node.state.unconfirmed.is_empty(), "{:?}", node.state.unconfirmed);
    }
}
