//! Where the control socket is.

use std::ffi::OsString;
use std::path::PathBuf;

use api::{Error, Kind};

/// The socket that `--socket` names, or else PARALLAX_SOCKET, else the default for this user.
///
/// # Errors
/// `Invalid` if there is no default: a directory that anybody may write, such as /tmp, would let
/// others pose as the daemon.
pub(crate) fn choose(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    // Not read by clap, which would show the option in usage lines as if it were required, and
    // give it to `quickstart`, which has a socket of its own.
    let given = given.or_else(|| std::env::var_os("PARALLAX_SOCKET").map(PathBuf::from));
    let root = rustix::process::geteuid().is_root();
    default(given, root, std::env::var_os("XDG_RUNTIME_DIR"))
}

fn default(
    given: Option<PathBuf>,
    root: bool,
    runtime_dir: Option<OsString>,
) -> Result<PathBuf, Error> {
    // As with most variables, an empty one counts as none.
    let given = given.filter(|path| !path.as_os_str().is_empty());
    match (given, runtime_dir) {
        (Some(path), _) => Ok(path),
        (None, _) if root => Ok("/run/parallax.sock".into()),
        (None, Some(dir)) if !dir.is_empty() => Ok(PathBuf::from(dir).join("parallax.sock")),
        _ => Err(Error::new(
            Kind::Invalid,
            "XDG_RUNTIME_DIR is not set: name the daemon's socket with --socket PATH or in \
             PARALLAX_SOCKET",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_the_users_own() {
        let check = |given: Option<&str>, root, dir: Option<&str>, expected: Option<&str>| {
            let chosen = default(given.map(Into::into), root, dir.map(Into::into));
            assert_eq!(chosen.ok(), expected.map(Into::into));
        };
        check(Some("/x"), true, Some("/run/user/0"), Some("/x"));
        check(None, true, Some("/run/user/0"), Some("/run/parallax.sock"));
        check(Some(""), true, None, Some("/run/parallax.sock"));
        check(None, false, Some("/run/user/7"), Some("/run/user/7/parallax.sock"));
        check(None, false, Some(""), None);
        check(None, false, None, None);
    }
}
