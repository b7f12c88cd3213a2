//! One mount, and the number of all, without the mount table (statmount(2) and listmount(2), kernel
//! 6.8).

use std::{io, os::fd::AsFd};

use rustix::{
    fs::{AtFlags, StatxFlags},
    io::Errno,
};

use super::mountinfo::{Dev, MountId};

/// `STATX_MNT_ID_UNIQUE` (include/uapi/linux/stat.h, kernel 6.8): the unique id of a mount, which
/// is never reused.
pub const STATX_MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

// The parts of a request (include/uapi/linux/mount.h).
const SB_BASIC: u64 = 0x1;
const MNT_BASIC: u64 = 0x2;
const MNT_ROOT: u64 = 0x8;
const FS_TYPE: u64 = 0x20;
const FS_SUBTYPE: u64 = 0x100;

// The offsets of fields of `struct statmount` in bytes.
const MASK: usize = 8;
const SB_DEV_MAJOR: usize = 16;
const SB_DEV_MINOR: usize = 20;
const SB_MAGIC: usize = 24;
const FS_TYPE_AT: usize = 36;
const MNT_ID_OLD: usize = 56;
const MNT_PARENT_ID_OLD: usize = 60;
const MNT_ATTR: usize = 64;
const MNT_PROPAGATION: usize = 72;
const MNT_ROOT_AT: usize = 104;
const FS_SUBTYPE_AT: usize = 120;
/// The strings, to which the fields above give offsets.
const STRINGS: usize = 512;

/// The room for the strings. A mount whose strings are longer is an error (`EOVERFLOW`).
const MAX_STRINGS: usize = 512;

/// Where the kernel writes. It is large, so it is made once and used for many mounts.
#[derive(Debug)]
pub struct Buffer([u8; STRINGS + MAX_STRINGS]);

impl Default for Buffer {
    fn default() -> Self {
        Buffer([0; STRINGS + MAX_STRINGS])
    }
}

/// What is asked of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// What needs no string, for which the kernel allocates memory: half the time.
    Basic,
    All,
}

impl Parts {
    fn bits(self) -> u64 {
        let basic = SB_BASIC | MNT_BASIC;
        match self {
            Parts::Basic => basic,
            Parts::All => basic | MNT_ROOT | FS_TYPE | FS_SUBTYPE,
        }
    }
}

/// A mount of the caller's mount namespace, as [`super::mountinfo::Mount`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountStatus<'b> {
    pub id: MountId,
    pub parent: MountId,
    pub dev: Dev,
    /// Whether mounts below it propagate to a peer group.
    pub is_shared: bool,
    /// The `MOUNT_ATTR_*` bits (mount_setattr(2)).
    pub attributes: u64,
    /// The type of its file system (statfs(2)).
    pub fs_magic: u64,
    /// With [`Parts::All`], as the rest.
    pub fstype: Option<&'b [u8]>,
    /// `None` if it has none, or the kernel is older than 6.13.
    pub subtype: Option<&'b [u8]>,
    /// The path within its file system that is the root of this mount.
    pub root: Option<&'b [u8]>,
}

/// Describes the mount that a file is opened in. Its file system is sent no request.
///
/// # Errors
/// `ENOSYS` before kernel 6.8, and those of statx(2) and statmount(2): `ENOENT` if the mount is no
/// longer in the caller's mount namespace.
pub fn of(file: impl AsFd, parts: Parts, buffer: &mut Buffer) -> io::Result<MountStatus<'_>> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(file, "", flags, STATX_MNT_ID_UNIQUE)?;
    if stat.stx_mask & STATX_MNT_ID_UNIQUE.bits() == 0 {
        return Err(Errno::NOSYS.into());
    }
    super::statmount(stat.stx_mnt_id, parts.bits(), &mut buffer.0)?;
    parse(&buffer.0).ok_or_else(|| io::Error::other("malformed result of statmount(2)"))
}

/// Whether the caller's mount namespace has fewer than `N` mounts that its root leads to.
///
/// # Errors
/// `ENOSYS` before kernel 6.8, and those of listmount(2).
pub fn has_fewer_than<const N: usize>() -> io::Result<bool> {
    Ok(super::listmount(&mut [0; N])? < N)
}

/// Reads the result of a call. `None` if a part is missing that every kernel with the call has.
fn parse(buffer: &[u8]) -> Option<MountStatus<'_>> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(*buffer.get(at..)?.first_chunk()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(*buffer.get(at..)?.first_chunk()?));
    let string_at = |at: usize| {
        let start = STRINGS.checked_add(usize::try_from(u32_at(at)?).ok()?)?;
        buffer.get(start..)?.split(|b| *b == 0).next()
    };
    let mask = u64_at(MASK)?;
    let needed = Parts::Basic.bits();
    if mask & needed != needed {
        return None;
    }
    let string_of = |part: u64, at: usize| {
        if mask & part == 0 { Some(None) } else { string_at(at).map(Some) }
    };
    Some(MountStatus {
        id: MountId(u32_at(MNT_ID_OLD)?.into()),
        parent: MountId(u32_at(MNT_PARENT_ID_OLD)?.into()),
        dev: Dev { major: u32_at(SB_DEV_MAJOR)?, minor: u32_at(SB_DEV_MINOR)? },
        is_shared: u64_at(MNT_PROPAGATION)? & libc::MS_SHARED != 0,
        attributes: u64_at(MNT_ATTR)?,
        fs_magic: u64_at(SB_MAGIC)?,
        fstype: string_of(FS_TYPE, FS_TYPE_AT)?,
        subtype: string_of(FS_SUBTYPE, FS_SUBTYPE_AT)?,
        root: string_of(MNT_ROOT, MNT_ROOT_AT)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::sys::mountinfo::MountTable;

    #[test]
    fn status_agrees_with_the_mount_table() {
        let mut buffer = Buffer::default();
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap();
        let table = MountTable::parse(&text).unwrap();
        for path in ["/proc", "/sys", "/dev"] {
            let file = std::fs::File::open(path).unwrap();
            let status = match of(&file, Parts::All, &mut buffer) {
                // Before kernel 6.8.
                Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => return,
                status => status.unwrap(),
            };
            let mount = table.top(path.as_bytes()).unwrap();
            assert_eq!((status.id, status.parent, status.dev), (mount.id, mount.parent, mount.dev));
            assert_eq!(status.is_shared, mount.shared.is_some());
            let fstype = [status.fstype, status.subtype];
            let fstype: Vec<&[u8]> = fstype.into_iter().flatten().collect();
            assert_eq!(fstype.join(&b'.'), *mount.fstype);
            assert_eq!(status.root, Some(&*mount.root));
            let basic = of(&file, Parts::Basic, &mut buffer).unwrap();
            assert_eq!((basic.id, basic.root), (mount.id, None));
            let fs = rustix::fs::fstatfs(&file).unwrap();
            assert_eq!(basic.fs_magic, u64::try_from(fs.f_type).unwrap());
        }
    }

    #[test]
    fn mounts_are_counted() {
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap();
        let table = MountTable::parse(&text).unwrap();
        assert!((2..4096).contains(&table.mounts().len()), "the test's own namespace");
        match has_fewer_than::<2>() {
            // Before kernel 6.8.
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {}
            fewer => {
                assert!(!fewer.unwrap());
                assert!(has_fewer_than::<4096>().unwrap());
            }
        }
    }

    proptest! {
        #[test]
        fn malformed_results_never_panic(bytes in vec(any::<u8>(), 0..1024)) {
            let _ = parse(&bytes);
        }
    }
}
