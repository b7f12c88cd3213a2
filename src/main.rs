//! The `kube-lxcfs` program.

use std::process::ExitCode;

use kube_lxcfs::{
    args::{self, kubectl::Program},
    commands, telemetry,
};

fn main() -> ExitCode {
    match args::kubectl::program(std::env::args_os().next().as_deref()) {
        Program::Agent => {}
        Program::Plugin => return commands::run_plugin(std::env::args_os()),
        Program::Completion => return commands::complete_plugin(std::env::args_os()),
    }
    match args::parse() {
        Ok(cli) => {
            telemetry::init(cli.common.log_format);
            commands::run(cli)
        }
        Err(exit_code) => exit_code,
    }
}
