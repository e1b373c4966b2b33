//! The `parallax` command: the daemon, and everything that talks to it.
//!
//! `args` defines the command line; `commands` has one module per family of commands; `output`
//! prints; `exit` turns errors into messages and exit codes; `nbd` is how commands read and
//! write disks themselves.

mod args;
mod commands;
mod exit;
mod nbd;
mod output;
mod socket;

use std::process::ExitCode;

use clap::Parser;

/// Blocks are aligned to their size. The C library's `malloc` takes twice as much for each: what a cache was
/// given, it took twice.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    // The daemon has asked for itself, under another name.
    if let Some(code) = daemon::called_aside() {
        return code;
    }
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::report_usage(&error, std::env::args_os().skip(1)),
    };
    let json = cli.global.json;
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error, json),
    }
}
