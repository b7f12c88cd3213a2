//! The binary: see [`kube_lxcfs::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    kube_lxcfs::cli::main()
}
