//! The `kube-lxcfs` program.

use std::process::ExitCode;

use kube_lxcfs::{args, commands, telemetry};

fn main() -> ExitCode {
    match args::parse() {
        Ok(cli) => {
            telemetry::init(cli.common.log_format);
            commands::run(cli)
        }
        Err(exit_code) => exit_code,
    }
}
