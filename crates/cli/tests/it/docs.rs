//! completion, man.

use crate::place::Place;

#[test]
fn shells_accept_their_completion() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.ok(&["completion", shell]);
        assert!(script.contains("snapshots") && script.contains("quickstart"), "{shell}");
    }
    std::fs::write(place.path("c"), place.ok(&["completion", "bash"])).unwrap();
    place.tool("bash", &["-n", "c"]);
    let complete = "source c; COMP_WORDS=(parallax qui); COMP_CWORD=1; \
                    _parallax parallax qui parallax; echo ${COMPREPLY[@]}";
    assert_eq!(place.tool("bash", &["-c", complete]).trim(), "quickstart");
    place.fails(1, &["completion", "tcsh"]);
}

#[test]
fn every_command_has_a_man_page() {
    let place = Place::new();
    place.ok(&["man", "pages/man1"]);
    let page =
        |name: &str| std::fs::read_to_string(place.path(&format!("pages/man1/{name}.1"))).unwrap();
    assert!(page("parallax").contains("Exit codes"));
    for name in ["serve", "format", "import", "check", "rollback", "stats"] {
        let text = page(&format!("parallax-{name}"));
        assert!(text.contains(".SH SYNOPSIS"), "{name}");
    }
    assert_eq!(place.json(&["man", "pages/man1"])["directory"], "pages/man1");
}
