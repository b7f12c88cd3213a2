//! Wished + there + the lxcfs that serves → steps. A pure function, the same for a start-up, a retry, a remount and an
//! annotation change; it makes no calls and reads no clock.

use std::{collections::BTreeMap, fmt};

use crate::view::{Base, FileSet, ViewFile};

/// The device number of a mount's file system (`st_dev`), the identity of one lxcfs: after a restart it is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dev {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What a container shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wish {
    /// Leave it as it is: what the pod says was not understood.
    Keep,
    /// No view.
    Nothing,
    /// These files, as far as lxcfs serves them; [`FileSet::ALL`] means all that it serves.
    Files(FileSet),
    /// What it has, made current, and these files too.
    Add(FileSet),
}

impl Wish {
    /// What it has, made current.
    pub const REFRESH: Wish = Wish::Add(FileSet::NONE);
}

/// The lxcfs that serves now, as far as the plan needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    pub dev: Dev,
    pub files: FileSet,
}

/// What one mount on a view file's path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A view file that kube-lxcfs put there.
    View(Dev),
    /// An lxcfs file that came with the pod, for example from an admission webhook's volume.
    Foreign(Dev),
    /// Anything else.
    Other,
}

/// One mount on a view file's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Mount id (`/proc/PID/mountinfo`, field 1).
    pub id: u64,
    pub kind: Kind,
}

/// Why no view file can be put below `/proc` or `/sys` of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Nothing is mounted there.
    Missing,
    /// Something that is not procfs (sysfs) is mounted there.
    Fstype(String),
    /// A mount made there would propagate into the host's mount namespace.
    SharedWithHost,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unusable::Missing => f.write_str("is not mounted in the container"),
            Unusable::Fstype(found) => write!(f, "is a {found} in the container"),
            Unusable::SharedWithHost => f.write_str("shares its mounts with the host's mount namespace"),
        }
    }
}

/// What is there: the reachable mounts on the view files' paths, bottom first, and what stands in the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct There {
    pub layers: BTreeMap<ViewFile, Vec<Layer>>,
    pub unusable: BTreeMap<Base, Unusable>,
}

impl There {
    /// The files whose topmost mount is a view file of ours, and the lxcfs that each comes from.
    pub fn views(&self) -> impl Iterator<Item = (ViewFile, Dev)> {
        self.layers.iter().filter_map(|(file, layers)| match layers.last()?.kind {
            Kind::View(dev) => Some((*file, dev)),
            _ => None,
        })
    }
}

/// One change of one container's mount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Mount the serving lxcfs's file on the container's own.
    Inject(ViewFile),
    /// Mount the serving lxcfs's file beneath this mount, then detach this one.
    Swap(ViewFile, u64),
    /// Detach this mount, a view file.
    Remove(ViewFile, u64),
    /// As [`Step::Swap`], for an lxcfs file that came with the pod; what takes its place counts as such still.
    Adopt(ViewFile, u64),
}

impl Step {
    pub fn file(self) -> ViewFile {
        match self {
            Step::Inject(file) | Step::Swap(file, _) | Step::Remove(file, _) | Step::Adopt(file, _) => file,
        }
    }
}

/// Why a wished file is not put in; reported, and no failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// The serving lxcfs has no such file.
    NotServed,
    /// The container's `/proc` or `/sys` has no such file.
    NotInContainer,
    /// Another mount, none of ours, is on the path.
    Occupied,
    /// An lxcfs file that came with the pod is on the path.
    CameWithThePod,
    /// The file system it would be mounted over is not as it must be.
    Base(Base, Unusable),
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeftOut::NotServed => f.write_str("not served by this lxcfs"),
            LeftOut::NotInContainer => f.write_str("the container has no such file"),
            LeftOut::Occupied => f.write_str("another mount is on its path"),
            LeftOut::CameWithThePod => f.write_str("an lxcfs file that came with the pod is on its path"),
            LeftOut::Base(base, why) => write!(f, "/{} {why}", base.path()),
        }
    }
}

/// The steps that lead from what is there to what is wished, and what is wished in vain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    pub left_out: Vec<(ViewFile, LeftOut)>,
}

/// Plans. Without a serving lxcfs nothing is put in and wished views stay as they are; what is not wished goes all the same.
/// With `adopt`, lxcfs files that came with the pod are made current too, whatever is wished.
pub fn plan(wish: Wish, there: &There, serving: Option<Serving>, adopt: bool) -> Plan {
    let mut plan = of_views(wish, there, serving);
    if let (true, Some(serving)) = (adopt, serving) {
        for (file, layers) in &there.layers {
            let usable = !there.unusable.contains_key(&file.base()) && serving.files.contains(*file);
            // View files of ours that lie on it by mistake were planned away above.
            let ours =
                layers.iter().rev().take_while(|l| wish != Wish::Keep && matches!(l.kind, Kind::View(_))).count();
            if let Some(Layer { id, kind: Kind::Foreign(dev) }) = layers[..layers.len() - ours].last()
                && usable
                && *dev != serving.dev
            {
                plan.steps.push(Step::Adopt(*file, *id));
            }
        }
    }
    plan
}

/// Plans to take out the view files of an lxcfs that is gone, whatever is wished: the container's own files show again.
pub fn sweep(there: &There, gone: impl Fn(Dev) -> bool) -> Plan {
    let mut plan = Plan::default();
    for (file, layers) in &there.layers {
        let dead = layers.iter().rev().take_while(|l| matches!(l.kind, Kind::View(dev) if gone(dev)));
        plan.steps.extend(dead.map(|l| Step::Remove(*file, l.id)));
    }
    plan
}

fn of_views(wish: Wish, there: &There, serving: Option<Serving>) -> Plan {
    let wished = match wish {
        Wish::Keep => return Plan::default(),
        Wish::Nothing => FileSet::NONE,
        Wish::Files(files) => files,
        Wish::Add(files) => there.views().map(|(file, _)| file).chain(files.iter()).collect(),
    };
    let mut plan = Plan::default();
    for file in ViewFile::ALL {
        let layers = there.layers.get(&file).map_or(&[][..], Vec::as_slice);
        // Only what is on top can be reached: mounts of ours that something else lies on wait until that is gone.
        let ours = layers.iter().rev().take_while(|l| matches!(l.kind, Kind::View(_))).count();
        let (below, ours) = layers.split_at(layers.len() - ours);
        let remove = |layers: &[Layer]| layers.iter().rev().map(|l| Step::Remove(file, l.id)).collect::<Vec<_>>();
        if !wished.contains(file) {
            plan.steps.extend(remove(ours));
            continue;
        }
        let Some(serving) = serving else {
            continue;
        };
        if !serving.files.contains(file) {
            plan.steps.extend(remove(ours));
            // «All» means all that lxcfs serves: what it does not is not missed.
            if wished != FileSet::ALL {
                plan.left_out.push((file, LeftOut::NotServed));
            }
            continue;
        }
        if let Some(why) = there.unusable.get(&file.base()) {
            plan.left_out.push((file, LeftOut::Base(file.base(), why.clone())));
            continue;
        }
        match (below.last().map(|l| l.kind), ours) {
            // A view file stacked on a mount that is not ours was put there by mistake: we never mount on one.
            (Some(kind), ours) => {
                plan.steps.extend(remove(ours));
                let why = if matches!(kind, Kind::Foreign(_)) { LeftOut::CameWithThePod } else { LeftOut::Occupied };
                plan.left_out.push((file, why));
            }
            (None, []) => plan.steps.push(Step::Inject(file)),
            // One stays: a current one if it is the lowest, else the lowest is swapped when the others are gone.
            (None, [lowest, above @ ..]) => {
                plan.steps.extend(remove(above));
                if lowest.kind != Kind::View(serving.dev) {
                    plan.steps.push(Step::Swap(file, lowest.id));
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
    const SERVING: Option<Serving> = Some(Serving { dev: NEW, files: FileSet::ALL });

    fn there(layers: &[Kind]) -> There {
        let layers = layers.iter().zip(1..).map(|(kind, id)| Layer { id, kind: *kind }).collect();
        There { layers: BTreeMap::from([(ViewFile::Meminfo, layers)]), ..There::default() }
    }

    fn meminfo() -> Wish {
        Wish::Files(FileSet::from_iter([ViewFile::Meminfo]))
    }

    #[test]
    fn the_table() {
        use Kind::{Foreign, Other, View};
        let f = ViewFile::Meminfo;
        let table: [(Wish, &[Kind], &[Step]); 17] = [
            (meminfo(), &[], &[Step::Inject(f)]),
            (meminfo(), &[View(NEW)], &[]),
            (meminfo(), &[View(OLD)], &[Step::Swap(f, 1)]),
            (meminfo(), &[View(OLD), View(NEW)], &[Step::Remove(f, 2), Step::Swap(f, 1)]),
            (meminfo(), &[View(NEW), View(NEW)], &[Step::Remove(f, 2)]),
            (meminfo(), &[Other], &[]),
            (meminfo(), &[Foreign(OLD)], &[]),
            (meminfo(), &[Other, View(NEW)], &[Step::Remove(f, 2)]),
            (meminfo(), &[View(OLD), Other], &[]),
            (Wish::Nothing, &[View(NEW)], &[Step::Remove(f, 1)]),
            (Wish::Nothing, &[View(OLD), View(NEW)], &[Step::Remove(f, 2), Step::Remove(f, 1)]),
            (Wish::Nothing, &[Foreign(NEW)], &[]),
            (Wish::Nothing, &[Other, View(OLD), Other], &[]),
            (Wish::Keep, &[View(OLD), View(OLD)], &[]),
            (Wish::REFRESH, &[View(OLD)], &[Step::Swap(f, 1)]),
            (Wish::REFRESH, &[], &[]),
            (Wish::REFRESH, &[Foreign(OLD)], &[]),
        ];
        for (wish, layers, steps) in table {
            assert_eq!(plan(wish, &there(layers), SERVING, false).steps, steps, "{wish:?} {layers:?}");
        }
    }

    #[test]
    fn without_a_serving_lxcfs_wished_views_stay_and_unwished_ones_go() {
        assert_eq!(plan(meminfo(), &there(&[Kind::View(OLD)]), None, false), Plan::default());
        assert_eq!(
            plan(Wish::Nothing, &there(&[Kind::View(OLD)]), None, false).steps,
            [Step::Remove(ViewFile::Meminfo, 1)]
        );
    }

    #[test]
    fn what_is_not_served_is_reported_only_when_it_was_named() {
        let serving = Some(Serving { dev: NEW, files: FileSet::NONE });
        assert_eq!(
            plan(meminfo(), &There::default(), serving, false).left_out,
            [(ViewFile::Meminfo, LeftOut::NotServed)]
        );
        assert_eq!(plan(Wish::Files(FileSet::ALL), &There::default(), serving, false), Plan::default());
        assert_eq!(
            plan(meminfo(), &there(&[Kind::View(OLD)]), serving, false).steps,
            [Step::Remove(ViewFile::Meminfo, 1)]
        );
    }

    #[test]
    fn only_with_adopt_what_came_with_the_pod_is_made_current() {
        use Kind::{Foreign, Other, View};
        let f = ViewFile::Meminfo;
        for (wish, layers, steps) in [
            (Wish::Nothing, &[Foreign(OLD)][..], &[Step::Adopt(f, 1)][..]),
            (meminfo(), &[Foreign(OLD)], &[Step::Adopt(f, 1)]),
            (Wish::Keep, &[Foreign(OLD)], &[Step::Adopt(f, 1)]),
            (meminfo(), &[Foreign(NEW)], &[]),
            (Wish::Nothing, &[Foreign(OLD), Other], &[]),
            (Wish::Nothing, &[View(OLD)], &[Step::Remove(f, 1)]),
        ] {
            assert_eq!(plan(wish, &there(layers), SERVING, true).steps, steps, "{wish:?} {layers:?}");
            let left_alone = plan(wish, &there(layers), SERVING, false).steps;
            assert!(!left_alone.iter().any(|s| matches!(s, Step::Adopt(..))));
        }
    }

    #[test]
    fn a_sweep_takes_out_what_is_gone_and_nothing_else() {
        use Kind::{Foreign, Other, View};
        let f = ViewFile::Meminfo;
        for (layers, steps) in [
            (&[View(OLD)][..], &[Step::Remove(f, 1)][..]),
            (&[View(OLD), View(OLD)], &[Step::Remove(f, 2), Step::Remove(f, 1)]),
            (&[View(NEW)], &[]),
            (&[Foreign(OLD)], &[]),
            (&[View(OLD), Other], &[]),
            (&[Other, View(OLD)], &[Step::Remove(f, 2)]),
        ] {
            assert_eq!(sweep(&there(layers), |dev| dev == OLD).steps, steps, "{layers:?}");
        }
    }

    fn kinds() -> impl Strategy<Value = Kind> {
        prop_oneof![
            3 => Just(Kind::View(NEW)),
            3 => Just(Kind::View(OLD)),
            1 => Just(Kind::Foreign(OLD)),
            1 => Just(Kind::Other),
        ]
    }

    fn bases() -> impl Strategy<Value = BTreeMap<Base, Unusable>> {
        let base = prop_oneof![Just(Base::Proc), Just(Base::Sys)];
        let why = prop_oneof![
            Just(Unusable::Missing),
            Just(Unusable::SharedWithHost),
            Just(Unusable::Fstype("tmpfs".into()))
        ];
        proptest::collection::btree_map(base, why, 0..2)
    }

    fn any_there() -> impl Strategy<Value = There> {
        let layers = proptest::collection::vec(proptest::collection::vec(kinds(), 0..4), ViewFile::ALL.len());
        (layers, bases()).prop_map(|(stacks, unusable)| {
            let mut ids = 1..;
            let stack =
                |kinds: Vec<Kind>| kinds.into_iter().map(|kind| Layer { id: ids.next().unwrap(), kind }).collect();
            There { layers: ViewFile::ALL.into_iter().zip(stacks.into_iter().map(stack)).collect(), unusable }
        })
    }

    fn file_sets() -> impl Strategy<Value = FileSet> {
        proptest::collection::vec(any::<bool>(), ViewFile::ALL.len())
            .prop_map(|bits| ViewFile::ALL.into_iter().zip(bits).filter(|(_, b)| *b).map(|(f, _)| f).collect())
    }

    fn any_wish() -> impl Strategy<Value = Wish> {
        prop_oneof![
            Just(Wish::Keep),
            Just(Wish::Nothing),
            Just(Wish::REFRESH),
            Just(Wish::Files(FileSet::ALL)),
            file_sets().prop_map(Wish::Add),
            file_sets().prop_map(Wish::Files),
        ]
    }

    /// What the kernel does with a step. Panics when a step names a mount that is not a view file on top of its path.
    fn apply(there: &mut There, step: Step) {
        let stack = there.layers.entry(step.file()).or_default();
        match step {
            Step::Inject(_) => {
                assert!(stack.is_empty(), "mounted on another mount");
                stack.push(Layer { id: 1000 + step.file() as u64, kind: Kind::View(NEW) });
            }
            Step::Adopt(_, id) => {
                let top = stack.last_mut().expect("a mount to adopt");
                assert_eq!((top.id, top.kind), (id, Kind::Foreign(OLD)), "not what came with the pod");
                top.kind = Kind::Foreign(NEW);
            }
            Step::Swap(_, id) | Step::Remove(_, id) => {
                let top = stack.pop().expect("a mount to detach");
                assert_eq!(top.id, id, "not the topmost");
                assert!(matches!(top.kind, Kind::View(_)), "detached a mount that is not ours");
                if let Step::Swap(..) = step {
                    stack.push(Layer { id: 1000 + step.file() as u64, kind: Kind::View(NEW) });
                }
            }
        }
    }

    proptest! {
        #[test]
        fn applied_and_observed_again_the_plan_is_empty(
            wish in any_wish(), before in any_there(), files in file_sets(), up in any::<bool>(), adopt in any::<bool>(),
        ) {
            let serving = up.then_some(Serving { dev: NEW, files });
            let first = plan(wish, &before, serving, adopt);
            let mut after = before.clone();
            for step in &first.steps {
                apply(&mut after, *step);
            }
            prop_assert_eq!(plan(wish, &after, serving, adopt).steps, vec![]);
            // Nothing but view files was touched.
            let others = |t: &There| t.layers.values().flatten().filter(|l| !matches!(l.kind, Kind::View(_))).map(|l| l.id).collect::<Vec<_>>();
            prop_assert_eq!(others(&before), others(&after));
            if wish == Wish::Nothing {
                prop_assert_eq!(after.views().count(), 0);
            }
            if let (Wish::Files(wished) | Wish::Add(wished), Some(serving)) = (wish, serving) {
                for file in wished.iter().filter(|f| serving.files.contains(*f)) {
                    let left_out = first.left_out.iter().any(|(f, _)| *f == file);
                    let current = after.views().any(|(f, dev)| f == file && dev == NEW);
                    prop_assert!(left_out || current, "{file} is neither there nor reported");
                }
            }
        }
    }
}
