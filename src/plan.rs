//! The plan: desired view, observed mounts and the serving lxcfs in, steps out. A pure function: it
//! makes no calls and reads no clock. A start of the agent, a retry, a remount pass and an
//! annotation change all use it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
};

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
    /// Its file system is writable, so that `cpu` is not among the files. A container with a user
    /// namespace could write to the node's sysfs through it.
    pub writable: bool,
}

/// The kind of a mount on a view file's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// A view file that kube-lxcfs mounted.
    Managed(Dev),
    /// A file that kube-lxcfs mounted over a locked one: of an lxcfs, or without a device the
    /// node's own file.
    Cover(Option<Dev>),
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
    /// The kernel refuses to detach it: it was copied into a nested user namespace
    /// (mount_namespaces(7)). The mount table does not show this.
    pub locked: bool,
}

impl Layer {
    /// Whether a mount must stay at this place of the stack.
    fn is_fixed(&self) -> bool {
        self.locked || matches!(self.kind, LayerKind::Cover(_))
    }

    fn cover(&self, file: ViewFile, with: CoverFile) -> Step {
        Step::Cover { file, mount: self.id, with, locked: self.locked }
    }

    /// The step that makes a managed mount come from the serving lxcfs, if it does not.
    fn make_current(&self, file: ViewFile, serving: Dev) -> Option<Step> {
        match self.kind {
            LayerKind::Managed(dev) | LayerKind::Cover(Some(dev)) if dev == serving => None,
            _ if self.is_fixed() => Some(self.cover(file, CoverFile::Lxcfs)),
            _ => Some(Step::Remount { file, mount: self.id }),
        }
    }
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

/// A mount and its file system. The kernel reuses the ids of mounts: the device shows that the file
/// system is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountIdentity {
    pub id: MountId,
    pub dev: Dev,
}

/// The mounts of a container that the plan depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedMounts {
    /// The reachable mounts on each view file's path, bottom first. If a mount covers a directory
    /// above the file, only that mount, as an unrelated one.
    pub layers: BTreeMap<ViewFile, Vec<Layer>>,
    /// The topmost mounts at `/proc` and `/sys`.
    pub bases: BTreeMap<BaseFs, MountIdentity>,
    /// The bases that cannot hold a view file.
    pub unusable: BTreeMap<BaseFs, UnusableBase>,
    /// The bases whose mounts propagate to a peer group, of the host or of any other namespace.
    pub shared: BTreeSet<BaseFs>,
    /// The scratch mounts of a kube-lxcfs that was killed, the topmost first.
    pub scratch: Vec<MountId>,
}

impl ObservedMounts {
    /// The files whose topmost mount is managed, and the lxcfs that each comes from.
    pub fn views(&self) -> impl Iterator<Item = (ViewFile, Dev)> {
        self.layers.iter().filter_map(|(file, layers)| match layers.last()?.kind {
            LayerKind::Managed(dev) | LayerKind::Cover(Some(dev)) => Some((*file, dev)),
            _ => None,
        })
    }

    /// Marks these mounts as locked.
    pub fn mark_locked(&mut self, mounts: &HashSet<MountId>) {
        for layer in self.layers.values_mut().flatten() {
            layer.locked |= mounts.contains(&layer.id);
        }
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
    /// Mount `with` over this locked managed mount, or in place of this cover.
    Cover { file: ViewFile, mount: MountId, with: CoverFile, locked: bool },
}

/// The file that covers a locked managed mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoverFile {
    /// The serving lxcfs's.
    Lxcfs,
    /// The node's own, which shows what the container's own file shows.
    Node,
}

impl Step {
    pub fn file(self) -> ViewFile {
        match self {
            Step::Inject(file)
            | Step::Remount { file, .. }
            | Step::Remove { file, .. }
            | Step::Adopt { file, .. }
            | Step::Cover { file, .. } => file,
        }
    }

    /// The operation that the step belongs to, in the words of metrics, Events and the command
    /// line.
    pub fn operation(self) -> Operation {
        match self {
            Step::Inject(_) => Operation::Inject,
            Step::Remove { .. } | Step::Cover { with: CoverFile::Node, .. } => Operation::Remove,
            Step::Remount { .. }
            | Step::Adopt { .. }
            | Step::Cover { with: CoverFile::Lxcfs, .. } => Operation::Remount,
        }
    }
}

/// The reason why a desired file is skipped. It is reported and is not a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// The serving lxcfs has no such file.
    NotServed,
    /// The serving lxcfs is not mounted read-only, and passes writes to this file on to the node.
    WritableLxcfs,
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
            SkipReason::WritableLxcfs => f.write_str(
                "lxcfs is writable; a node administrator can make it read-only: \
                 mount -o remount,ro LXCFS_PATH",
            ),
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
    /// The desired files that the container has from the serving lxcfs after the steps.
    pub view: FileSet,
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
            let below = match desired {
                DesiredView::Unmanaged => layers.last(),
                _ => split(layers).0,
            };
            if let Some(Layer { id, kind: LayerKind::PodProvided(dev), .. }) = below
                && usable
            {
                if *dev != serving.dev {
                    plan.steps.push(Step::Adopt { file: *file, mount: *id });
                }
                // A desired one: it is kept current as a view file is.
                if plan.skipped.contains(&(*file, SkipReason::PodProvided)) {
                    plan.view.insert(*file);
                }
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
        let (_, managed) = split(layers);
        let dead = managed.iter().rev().take_while(|l| match l.kind {
            LayerKind::Managed(dev) | LayerKind::Cover(Some(dev)) => exited(dev),
            _ => false,
        });
        let kept = managed.len() - dead.count();
        plan.steps.extend(remove(*file, &managed[kept..]));
    }
    plan
}

/// The managed layers on top of a stack that can be changed, and the layer below them. They go down
/// to one that stays: what lies below that one does not matter.
fn split(layers: &[Layer]) -> (Option<&Layer>, &[Layer]) {
    let is_managed = |l: &&Layer| matches!(l.kind, LayerKind::Managed(_) | LayerKind::Cover(_));
    let run = layers.iter().rev().take_while(is_managed).count();
    let (below, managed) = layers.split_at(layers.len() - run);
    match managed.iter().rposition(Layer::is_fixed) {
        Some(lowest) => (None, &managed[lowest..]),
        None => (below.last(), managed),
    }
}

/// Removes managed layers, the topmost first. One that stays is covered.
fn remove(file: ViewFile, layers: &[Layer]) -> Vec<Step> {
    let remove = |l: &Layer| match l.kind {
        // It shows the node's own file already.
        LayerKind::Cover(None) => None,
        _ if l.is_fixed() => Some(l.cover(file, CoverFile::Node)),
        _ => Some(Step::Remove { file, mount: l.id }),
    };
    layers.iter().rev().filter_map(remove).collect()
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
        let (below, managed) = split(layers);
        if !desired.contains(file) {
            plan.steps.extend(remove(file, managed));
            continue;
        }
        let Some(serving) = serving else {
            continue;
        };
        if !serving.files.contains(file) {
            plan.steps.extend(remove(file, managed));
            if file == ViewFile::Cpu && serving.writable {
                plan.skipped.push((file, SkipReason::WritableLxcfs));
            // `ALL` means all that lxcfs serves: another file is not reported as skipped.
            } else if desired != FileSet::ALL {
                plan.skipped.push((file, SkipReason::NotServed));
            }
            continue;
        }
        if let Some(why) = observed.unusable.get(&file.base()) {
            plan.skipped.push((file, SkipReason::Base(file.base(), why.clone())));
            continue;
        }
        match (below, managed) {
            // A managed mount that is stacked on another kind is a mistake: kube-lxcfs never mounts
            // on one.
            (Some(below), managed) => {
                plan.steps.extend(remove(file, managed));
                let why = match below.kind {
                    LayerKind::PodProvided(_) => SkipReason::PodProvided,
                    _ => SkipReason::PathOccupied,
                };
                plan.skipped.push((file, why));
            }
            (None, []) => {
                plan.view.insert(file);
                plan.steps.push(Step::Inject(file));
            }
            // One stays: the lowest. The others are removed first, and the lowest is made current.
            (None, [lowest, above @ ..]) => {
                plan.view.insert(file);
                plan.steps.extend(remove(file, above));
                plan.steps.extend(lowest.make_current(file, serving.dev));
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
    const SERVING: Option<ServingLxcfs> =
        Some(ServingLxcfs { dev: NEW, files: FileSet::ALL, writable: false });

    fn observed(layers: &[LayerKind]) -> ObservedMounts {
        let layers = layers
            .iter()
            .zip(1..)
            .map(|(kind, id)| Layer { id: MountId(id), kind: *kind, locked: false })
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

    fn cover(mount: u64, with: CoverFile, locked: bool) -> Step {
        Step::Cover { file: FILE, mount: MountId(mount), with, locked }
    }

    #[test]
    fn view_is_what_the_container_has_after_the_steps() {
        use LayerKind::{Managed, PodProvided, Unrelated};
        let files = FileSet::from_iter([ViewFile::Meminfo]);
        let serving = Some(ServingLxcfs { dev: NEW, files, writable: false });
        let view = |desired, layers: &[LayerKind], adopt| {
            !plan(desired, &observed(layers), serving, adopt).view.is_empty()
        };
        let all = DesiredView::Exactly(FileSet::ALL);
        for (layers, has_view) in [
            (&[][..], true),
            (&[Managed(OLD)], true),
            (&[Managed(NEW)], true),
            (&[Unrelated], false),
            (&[PodProvided(NEW)], false),
        ] {
            assert_eq!(view(all, layers, false), has_view, "{layers:?}");
            assert!(!view(DesiredView::Absent, layers, false));
        }
        assert!(view(all, &[PodProvided(NEW)], true) && view(all, &[PodProvided(OLD)], true));
        assert!(!view(DesiredView::Absent, &[PodProvided(OLD)], true));
    }

    #[test]
    fn locked_mounts_are_covered_and_covers_replaced() {
        use CoverFile::{Lxcfs, Node};
        use LayerKind::{Cover, Managed, Unrelated};
        type Case = (DesiredView, &'static [LayerKind], &'static [u64], Vec<Step>);
        let table: [Case; 10] = [
            (meminfo(), &[Managed(OLD)], &[1], vec![cover(1, Lxcfs, true)]),
            (meminfo(), &[Managed(NEW)], &[1], vec![]),
            (meminfo(), &[Cover(Some(OLD))], &[], vec![cover(1, Lxcfs, false)]),
            (meminfo(), &[Cover(Some(NEW))], &[], vec![]),
            (meminfo(), &[Cover(None)], &[], vec![cover(1, Lxcfs, false)]),
            (DesiredView::REMOUNT_ONLY, &[Cover(None)], &[], vec![]),
            (DesiredView::Absent, &[Managed(OLD)], &[1], vec![cover(1, Node, true)]),
            (
                DesiredView::Absent,
                &[Managed(OLD), Managed(OLD), Managed(NEW)],
                &[1, 2],
                vec![remove(3), cover(2, Node, true)],
            ),
            (DesiredView::Absent, &[Cover(None)], &[], vec![]),
            (DesiredView::Absent, &[Unrelated, Managed(OLD)], &[2], vec![cover(2, Node, true)]),
        ];
        for (desired, layers, locked, steps) in table {
            let mut observed = observed(layers);
            observed.mark_locked(&locked.iter().copied().map(MountId).collect());
            assert_eq!(
                plan(desired, &observed, SERVING, false).steps,
                steps,
                "{desired:?} {layers:?} {locked:?}"
            );
        }
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
        let serving = Some(ServingLxcfs { dev: NEW, files: FileSet::NONE, writable: false });
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
    fn cpu_of_a_writable_lxcfs_is_skipped_and_removed() {
        let files = FileSet::ALL.iter().filter(|f| *f != ViewFile::Cpu).collect();
        let serving = Some(ServingLxcfs { dev: NEW, files, writable: true });
        let layer = Layer { id: MountId(1), kind: LayerKind::Managed(OLD), locked: false };
        let observed = ObservedMounts {
            layers: BTreeMap::from([(ViewFile::Cpu, vec![layer])]),
            ..ObservedMounts::default()
        };
        let plan = plan(DesiredView::Exactly(FileSet::ALL), &observed, serving, false);
        assert_eq!(plan.skipped, [(ViewFile::Cpu, SkipReason::WritableLxcfs)]);
        let removed = Step::Remove { file: ViewFile::Cpu, mount: MountId(1) };
        assert!(plan.steps.contains(&removed), "{plan:?}");
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
    fn sweep_covers_locked_and_covered_mounts() {
        use CoverFile::Node;
        use LayerKind::{Cover, Managed};
        for (layers, locked, steps) in [
            (&[Managed(OLD)][..], &[1][..], vec![cover(1, Node, true)]),
            (&[Managed(OLD), Managed(OLD)], &[1], vec![remove(2), cover(1, Node, true)]),
            (&[Cover(Some(OLD))], &[], vec![cover(1, Node, false)]),
            (&[Cover(Some(OLD))], &[1], vec![cover(1, Node, true)]),
            (&[Cover(Some(NEW))], &[], vec![]),
            (&[Cover(None)], &[], vec![]),
        ] {
            let mut observed = observed(layers);
            observed.mark_locked(&locked.iter().copied().map(MountId).collect());
            assert_eq!(plan_sweep(&observed, |dev| dev == OLD).steps, steps, "{layers:?}");
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

    /// Only managed mounts are locked, and a cover is the lowest of them that matters.
    fn stack() -> impl Strategy<Value = Vec<(LayerKind, bool)>> {
        let cover = prop_oneof![Just(None), Just(Some(OLD)), Just(Some(NEW))];
        let cover = proptest::option::weighted(0.2, cover.prop_map(LayerKind::Cover));
        let above = proptest::collection::vec((kinds(), proptest::bool::weighted(0.2)), 0..4);
        (cover, above).prop_map(|(cover, above)| {
            let lock = |(kind, locked)| (kind, locked && matches!(kind, LayerKind::Managed(_)));
            cover.map(|kind| (kind, false)).into_iter().chain(above.into_iter().map(lock)).collect()
        })
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
        let layers = proptest::collection::vec(stack(), ViewFile::ALL.len());
        (layers, bases()).prop_map(|(stacks, unusable)| {
            let mut ids = 1..;
            let stack = |kinds: Vec<(LayerKind, bool)>| {
                let layer =
                    |(kind, locked)| Layer { id: MountId(ids.next().unwrap()), kind, locked };
                kinds.into_iter().map(layer).collect()
            };
            ObservedMounts {
                layers: ViewFile::ALL.into_iter().zip(stacks.into_iter().map(stack)).collect(),
                unusable,
                ..ObservedMounts::default()
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
        let id = MountId(1000 + step.file() as u64);
        let new = |kind| Layer { id, kind, locked: false };
        match step {
            Step::Inject(_) => {
                assert!(stack.is_empty(), "mounted on another mount");
                stack.push(new(LayerKind::Managed(NEW)));
            }
            Step::Cover { mount, with, locked, .. } => {
                let top = stack.last().expect("a mount to cover");
                assert_eq!((top.id, top.locked), (mount, locked), "not the topmost");
                let kinds = matches!(top.kind, LayerKind::Managed(_) | LayerKind::Cover(_));
                assert!(kinds, "covered an unmanaged mount");
                if !locked {
                    assert!(matches!(top.kind, LayerKind::Cover(_)), "detached a locked mount");
                    stack.pop();
                }
                stack.push(new(LayerKind::Cover((with == CoverFile::Lxcfs).then_some(NEW))));
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
                assert!(!top.locked, "detached a locked mount");
                if let Step::Remount { .. } = step {
                    stack.push(new(LayerKind::Managed(NEW)));
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
            let serving = up.then_some(ServingLxcfs { dev: NEW, files, writable: false });
            let first = plan(desired, &before, serving, adopt);
            let mut after = before.clone();
            for step in &first.steps {
                apply(&mut after, *step);
            }
            prop_assert_eq!(plan(desired, &after, serving, adopt).steps, vec![]);
            // Nothing but managed mounts was touched.
            let unmanaged = |t: &ObservedMounts| {
                let layers = t.layers.values().flatten();
                let others = layers.filter(|l| {
                    matches!(l.kind, LayerKind::PodProvided(_) | LayerKind::Unrelated)
                });
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
