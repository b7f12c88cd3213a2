//! The plan: desired view, observed mounts and the serving lxcfs in, steps out. A pure function: it
//! makes no calls and reads no clock. A start of the agent, a retry, a remount pass and an
//! annotation change all use it.

use std::{collections::BTreeMap, fmt};

use crate::{
    model::{
        status::Operation,
        view::{BaseFs, FileSet, ViewFile},
    },
    sys::mountinfo::{Dev, MountId},
};

/// The view that a container is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DesiredView {
    /// Leave the container as it is: its pod's annotations are invalid.
    Unmanaged,
    /// No view.
    Absent,
    /// These files, as far as lxcfs serves them; [`FileSet::ALL`] means all that it serves.
    Exactly(FileSet),
    /// The files that it has, made current, and these files too.
    AtLeast(FileSet),
}

impl DesiredView {
    /// The files that it has, made current.
    pub const REMOUNT_ONLY: DesiredView = DesiredView::AtLeast(FileSet::NONE);
}

/// The lxcfs that serves now: its device and its view files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServingLxcfs {
    pub dev: Dev,
    pub files: FileSet,
}

/// The kind of a mount on a view file's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// A view file that kube-lxcfs mounted.
    Managed(Dev),
    /// An lxcfs file that came with the pod, for example from an admission webhook's volume.
    PodProvided(Dev),
    /// Anything else.
    Unrelated,
}

/// One mount on a view file's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    pub id: MountId,
    pub kind: LayerKind,
}

/// The reason why no view file can be mounted below `/proc` or `/sys` of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnusableBase {
    /// Nothing is mounted at its path.
    Missing,
    /// Another file system than procfs (sysfs) is mounted at its path.
    Fstype(String),
    /// A mount below it would propagate into the host's mount namespace.
    SharedWithHost,
}

impl fmt::Display for UnusableBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnusableBase::Missing => f.write_str("is not mounted in the container"),
            UnusableBase::Fstype(found) => write!(f, "is a {found} in the container"),
            UnusableBase::SharedWithHost => {
                f.write_str("shares its mounts with the host's mount namespace")
            }
        }
    }
}

/// The mounts of a container that the plan depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedMounts {
    /// The reachable mounts on each view file's path, bottom first.
    pub layers: BTreeMap<ViewFile, Vec<Layer>>,
    /// The bases that cannot hold a view file.
    pub unusable: BTreeMap<BaseFs, UnusableBase>,
}

impl ObservedMounts {
    /// The files whose topmost mount is managed, and the lxcfs that each comes from.
    pub fn views(&self) -> impl Iterator<Item = (ViewFile, Dev)> {
        self.layers.iter().filter_map(|(file, layers)| match layers.last()?.kind {
            LayerKind::Managed(dev) => Some((*file, dev)),
            _ => None,
        })
    }
}

/// One change of one container's mount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Mount the serving lxcfs's file on the container's file.
    Inject(ViewFile),
    /// Mount the serving lxcfs's file beneath this managed mount, then detach this mount.
    Remount { file: ViewFile, mount: MountId },
    /// Detach this managed mount.
    Remove { file: ViewFile, mount: MountId },
    /// As [`Step::Remount`], for a pod-provided mount; the new mount counts as pod-provided too.
    Adopt { file: ViewFile, mount: MountId },
}

impl Step {
    pub fn file(self) -> ViewFile {
        match self {
            Step::Inject(file)
            | Step::Remount { file, .. }
            | Step::Remove { file, .. }
            | Step::Adopt { file, .. } => file,
        }
    }

    /// The operation that the step belongs to, in the words of metrics, Events and the command
    /// line.
    pub fn operation(self) -> Operation {
        match self {
            Step::Inject(_) => Operation::Inject,
            Step::Remove { .. } => Operation::Remove,
            Step::Remount { .. } | Step::Adopt { .. } => Operation::Remount,
        }
    }
}

/// The reason why a desired file is skipped. It is reported and is not a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// The serving lxcfs has no such file.
    NotServed,
    /// The container's `/proc` or `/sys` has no such file.
    NotInContainer,
    /// An unrelated mount is on the path.
    PathOccupied,
    /// A pod-provided lxcfs file is on the path.
    PodProvided,
    /// The file system that it would be mounted on is unusable.
    Base(BaseFs, UnusableBase),
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SkipReason::NotServed => f.write_str("not served by this lxcfs"),
            SkipReason::NotInContainer => f.write_str("the container has no such file"),
            SkipReason::PathOccupied => f.write_str("another mount is on its path"),
            SkipReason::PodProvided => f.write_str("a pod-provided lxcfs file is on its path"),
            SkipReason::Base(base, why) => write!(f, "/{} {why}", base.path()),
        }
    }
}

/// The steps from the observed mounts to the desired view, and the desired files that are skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    pub skipped: Vec<(ViewFile, SkipReason)>,
}

/// Plans. Without a serving lxcfs nothing is injected and desired views stay as they are; undesired
/// ones are removed. With `adopt`, pod-provided lxcfs files are made current too, for any desired
/// view.
pub fn plan(
    desired: DesiredView,
    observed: &ObservedMounts,
    serving: Option<ServingLxcfs>,
    adopt: bool,
) -> Plan {
    let mut plan = plan_managed(desired, observed, serving);
    if let (true, Some(serving)) = (adopt, serving) {
        for (file, layers) in &observed.layers {
            let usable =
                !observed.unusable.contains_key(&file.base()) && serving.files.contains(*file);
            // Managed mounts that lie on it by mistake are removed by the steps above.
            let is_removed = |l: &&Layer| {
                desired != DesiredView::Unmanaged && matches!(l.kind, LayerKind::Managed(_))
            };
            let removed = layers.iter().rev().take_while(is_removed).count();
            if let Some(Layer { id, kind: LayerKind::PodProvided(dev) }) =
                layers[..layers.len() - removed].last()
                && usable
                && *dev != serving.dev
            {
                plan.steps.push(Step::Adopt { file: *file, mount: *id });
            }
        }
    }
    plan
}

/// Plans to remove the managed mounts of an lxcfs that exited, for any desired view: the
/// container's own files show again.
pub fn plan_sweep(observed: &ObservedMounts, exited: impl Fn(Dev) -> bool) -> Plan {
    let mut plan = Plan::default();
    for (file, layers) in &observed.layers {
        let dead = layers
            .iter()
            .rev()
            .take_while(|l| matches!(l.kind, LayerKind::Managed(dev) if exited(dev)));
        plan.steps.extend(dead.map(|l| Step::Remove { file: *file, mount: l.id }));
    }
    plan
}

fn plan_managed(
    desired: DesiredView,
    observed: &ObservedMounts,
    serving: Option<ServingLxcfs>,
) -> Plan {
    let desired = match desired {
        DesiredView::Unmanaged => return Plan::default(),
        DesiredView::Absent => FileSet::NONE,
        DesiredView::Exactly(files) => files,
        DesiredView::AtLeast(files) => {
            observed.views().map(|(file, _)| file).chain(files.iter()).collect()
        }
    };
    let mut plan = Plan::default();
    for file in ViewFile::ALL {
        let layers = observed.layers.get(&file).map_or(&[][..], Vec::as_slice);
        // Only the top can be reached: managed mounts below an unrelated one wait until that is
        // unmounted.
        let managed =
            layers.iter().rev().take_while(|l| matches!(l.kind, LayerKind::Managed(_))).count();
        let (below, managed) = layers.split_at(layers.len() - managed);
        let remove = |layers: &[Layer]| {
            layers.iter().rev().map(|l| Step::Remove { file, mount: l.id }).collect::<Vec<_>>()
        };
        if !desired.contains(file) {
            plan.steps.extend(remove(managed));
            continue;
        }
        let Some(serving) = serving else {
            continue;
        };
        if !serving.files.contains(file) {
            plan.steps.extend(remove(managed));
            // `ALL` means all that lxcfs serves: another file is not reported as skipped.
            if desired != FileSet::ALL {
                plan.skipped.push((file, SkipReason::NotServed));
            }
            continue;
        }
        if let Some(why) = observed.unusable.get(&file.base()) {
            plan.skipped.push((file, SkipReason::Base(file.base(), why.clone())));
            continue;
        }
        match (below.last().map(|l| l.kind), managed) {
            // A managed mount that is stacked on another kind is a mistake: kube-lxcfs never mounts
            // on one.
            (Some(kind), managed) => {
                plan.steps.extend(remove(managed));
                let why = match kind {
                    LayerKind::PodProvided(_) => SkipReason::PodProvided,
                    LayerKind::Managed(_) | LayerKind::Unrelated => SkipReason::PathOccupied,
                };
                plan.skipped.push((file, why));
            }
            (None, []) => plan.steps.push(Step::Inject(file)),
            // One stays: the lowest. The others are removed first, and the lowest is remounted
            // unless it is current.
            (None, [lowest, above @ ..]) => {
                plan.steps.extend(remove(above));
                if lowest.kind != LayerKind::Managed(serving.dev) {
                    plan.steps.push(Step::Remount { file, mount: lowest.id });
                }
            }
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NEW: Dev = Dev { major: 0, minor: 2 };
    const OLD: Dev = Dev { major: 0, minor: 1 };
    const SERVING: Option<ServingLxcfs> = Some(ServingLxcfs { dev: NEW, files: FileSet::ALL });

    fn observed(layers: &[LayerKind]) -> ObservedMounts {
        let layers = layers
            .iter()
            .zip(1..)
            .map(|(kind, id)| Layer { id: MountId(id), kind: *kind })
            .collect();
        ObservedMounts {
            layers: BTreeMap::from([(ViewFile::Meminfo, layers)]),
            ..ObservedMounts::default()
        }
    }

    fn meminfo() -> DesiredView {
        DesiredView::Exactly(FileSet::from_iter([ViewFile::Meminfo]))
    }

    const FILE: ViewFile = ViewFile::Meminfo;

    fn remount(mount: u64) -> Step {
        Step::Remount { file: FILE, mount: MountId(mount) }
    }

    fn remove(mount: u64) -> Step {
        Step::Remove { file: FILE, mount: MountId(mount) }
    }

    fn adopt(mount: u64) -> Step {
        Step::Adopt { file: FILE, mount: MountId(mount) }
    }

    #[test]
    fn plan_table() {
        use LayerKind::{Managed, PodProvided, Unrelated};
        let table: [(DesiredView, &[LayerKind], &[Step]); 17] = [
            (meminfo(), &[], &[Step::Inject(FILE)]),
            (meminfo(), &[Managed(NEW)], &[]),
            (meminfo(), &[Managed(OLD)], &[remount(1)]),
            (meminfo(), &[Managed(OLD), Managed(NEW)], &[remove(2), remount(1)]),
            (meminfo(), &[Managed(NEW), Managed(NEW)], &[remove(2)]),
            (meminfo(), &[Unrelated], &[]),
            (meminfo(), &[PodProvided(OLD)], &[]),
            (meminfo(), &[Unrelated, Managed(NEW)], &[remove(2)]),
            (meminfo(), &[Managed(OLD), Unrelated], &[]),
            (DesiredView::Absent, &[Managed(NEW)], &[remove(1)]),
            (DesiredView::Absent, &[Managed(OLD), Managed(NEW)], &[remove(2), remove(1)]),
            (DesiredView::Absent, &[PodProvided(NEW)], &[]),
            (DesiredView::Absent, &[Unrelated, Managed(OLD), Unrelated], &[]),
            (DesiredView::Unmanaged, &[Managed(OLD), Managed(OLD)], &[]),
            (DesiredView::REMOUNT_ONLY, &[Managed(OLD)], &[remount(1)]),
            (DesiredView::REMOUNT_ONLY, &[], &[]),
            (DesiredView::REMOUNT_ONLY, &[PodProvided(OLD)], &[]),
        ];
        for (desired, layers, steps) in table {
            assert_eq!(
                plan(desired, &observed(layers), SERVING, false).steps,
                steps,
                "{desired:?} {layers:?}"
            );
        }
    }

    #[test]
    fn without_lxcfs_only_undesired_views_are_removed() {
        assert_eq!(
            plan(meminfo(), &observed(&[LayerKind::Managed(OLD)]), None, false),
            Plan::default()
        );
        assert_eq!(
            plan(DesiredView::Absent, &observed(&[LayerKind::Managed(OLD)]), None, false).steps,
            [remove(1)]
        );
    }

    #[test]
    fn unserved_file_is_reported_only_when_named() {
        let serving = Some(ServingLxcfs { dev: NEW, files: FileSet::NONE });
        assert_eq!(
            plan(meminfo(), &ObservedMounts::default(), serving, false).skipped,
            [(ViewFile::Meminfo, SkipReason::NotServed)]
        );
        assert_eq!(
            plan(DesiredView::Exactly(FileSet::ALL), &ObservedMounts::default(), serving, false),
            Plan::default()
        );
        assert_eq!(
            plan(meminfo(), &observed(&[LayerKind::Managed(OLD)]), serving, false).steps,
            [remove(1)]
        );
    }

    #[test]
    fn pod_provided_is_remounted_only_with_adopt() {
        use LayerKind::{Managed, PodProvided, Unrelated};
        for (desired, layers, steps) in [
            (DesiredView::Absent, &[PodProvided(OLD)][..], &[adopt(1)][..]),
            (meminfo(), &[PodProvided(OLD)], &[adopt(1)]),
            (DesiredView::Unmanaged, &[PodProvided(OLD)], &[adopt(1)]),
            (meminfo(), &[PodProvided(NEW)], &[]),
            (DesiredView::Absent, &[PodProvided(OLD), Unrelated], &[]),
            (DesiredView::Absent, &[Managed(OLD)], &[remove(1)]),
        ] {
            assert_eq!(
                plan(desired, &observed(layers), SERVING, true).steps,
                steps,
                "{desired:?} {layers:?}"
            );
            let without_adopt = plan(desired, &observed(layers), SERVING, false).steps;
            assert!(!without_adopt.iter().any(|s| matches!(s, Step::Adopt { .. })));
        }
    }

    #[test]
    fn sweep_removes_only_views_of_exited_lxcfs() {
        use LayerKind::{Managed, PodProvided, Unrelated};
        for (layers, steps) in [
            (&[Managed(OLD)][..], &[remove(1)][..]),
            (&[Managed(OLD), Managed(OLD)], &[remove(2), remove(1)]),
            (&[Managed(NEW)], &[]),
            (&[PodProvided(OLD)], &[]),
            (&[Managed(OLD), Unrelated], &[]),
            (&[Unrelated, Managed(OLD)], &[remove(2)]),
        ] {
            assert_eq!(plan_sweep(&observed(layers), |dev| dev == OLD).steps, steps, "{layers:?}");
        }
    }

    fn kinds() -> impl Strategy<Value = LayerKind> {
        prop_oneof![
            3 => Just(LayerKind::Managed(NEW)),
            3 => Just(LayerKind::Managed(OLD)),
            1 => Just(LayerKind::PodProvided(OLD)),
            1 => Just(LayerKind::Unrelated),
        ]
    }

    fn bases() -> impl Strategy<Value = BTreeMap<BaseFs, UnusableBase>> {
        let base = prop_oneof![Just(BaseFs::Procfs), Just(BaseFs::Sysfs)];
        let why = prop_oneof![
            Just(UnusableBase::Missing),
            Just(UnusableBase::SharedWithHost),
            Just(UnusableBase::Fstype("tmpfs".into()))
        ];
        proptest::collection::btree_map(base, why, 0..2)
    }

    fn any_observed() -> impl Strategy<Value = ObservedMounts> {
        let layers = proptest::collection::vec(
            proptest::collection::vec(kinds(), 0..4),
            ViewFile::ALL.len(),
        );
        (layers, bases()).prop_map(|(stacks, unusable)| {
            let mut ids = 1..;
            let stack = |kinds: Vec<LayerKind>| {
                kinds
                    .into_iter()
                    .map(|kind| Layer { id: MountId(ids.next().unwrap()), kind })
                    .collect()
            };
            ObservedMounts {
                layers: ViewFile::ALL.into_iter().zip(stacks.into_iter().map(stack)).collect(),
                unusable,
            }
        })
    }

    fn file_sets() -> impl Strategy<Value = FileSet> {
        proptest::collection::vec(any::<bool>(), ViewFile::ALL.len()).prop_map(|bits| {
            ViewFile::ALL.into_iter().zip(bits).filter(|(_, b)| *b).map(|(f, _)| f).collect()
        })
    }

    fn any_desired() -> impl Strategy<Value = DesiredView> {
        prop_oneof![
            Just(DesiredView::Unmanaged),
            Just(DesiredView::Absent),
            Just(DesiredView::REMOUNT_ONLY),
            Just(DesiredView::Exactly(FileSet::ALL)),
            file_sets().prop_map(DesiredView::AtLeast),
            file_sets().prop_map(DesiredView::Exactly),
        ]
    }

    /// Simulates a step. Panics when it names a mount that is not a managed one on top of its path.
    fn apply(observed: &mut ObservedMounts, step: Step) {
        let stack = observed.layers.entry(step.file()).or_default();
        match step {
            Step::Inject(_) => {
                assert!(stack.is_empty(), "mounted on another mount");
                stack.push(Layer {
                    id: MountId(1000 + step.file() as u64),
                    kind: LayerKind::Managed(NEW),
                });
            }
            Step::Adopt { mount, .. } => {
                let top = stack.last_mut().expect("a mount to adopt");
                assert_eq!(
                    (top.id, top.kind),
                    (mount, LayerKind::PodProvided(OLD)),
                    "not a pod-provided mount"
                );
                top.kind = LayerKind::PodProvided(NEW);
            }
            Step::Remount { mount, .. } | Step::Remove { mount, .. } => {
                let top = stack.pop().expect("a mount to detach");
                assert_eq!(top.id, mount, "not the topmost");
                assert!(matches!(top.kind, LayerKind::Managed(_)), "detached an unmanaged mount");
                if let Step::Remount { .. } = step {
                    stack.push(Layer {
                        id: MountId(1000 + step.file() as u64),
                        kind: LayerKind::Managed(NEW),
                    });
                }
            }
        }
    }

    proptest! {
        #[test]
        fn applied_plan_leaves_nothing_to_do(
            desired in any_desired(),
            before in any_observed(),
            files in file_sets(),
            up in any::<bool>(),
            adopt in any::<bool>(),
        ) {
            let serving = up.then_some(ServingLxcfs { dev: NEW, files });
            let first = plan(desired, &before, serving, adopt);
            let mut after = before.clone();
            for step in &first.steps {
                apply(&mut after, *step);
            }
            prop_assert_eq!(plan(desired, &after, serving, adopt).steps, vec![]);
            // Nothing but managed mounts was touched.
            let unmanaged = |t: &ObservedMounts| {
                let layers = t.layers.values().flatten();
                let others = layers.filter(|l| !matches!(l.kind, LayerKind::Managed(_)));
                others.map(|l| l.id).collect::<Vec<_>>()
            };
            prop_assert_eq!(unmanaged(&before), unmanaged(&after));
            if desired == DesiredView::Absent {
                prop_assert_eq!(after.views().count(), 0);
            }
            if let DesiredView::Exactly(files) | DesiredView::AtLeast(files) = desired {
                let served = |f: &ViewFile| serving.is_some_and(|s| s.files.contains(*f));
                for file in files.iter().filter(served) {
                    let skipped = first.skipped.iter().any(|(f, _)| *f == file);
                    let current = after.views().any(|(f, dev)| f == file && dev == NEW);
                    prop_assert!(skipped || current, "{file} is neither mounted nor reported");
                }
            }
        }
    }
}
