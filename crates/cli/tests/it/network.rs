//! Where NBD is served, and to whom.

use crate::place::Place;

#[test]
fn every_disk_and_snapshot_is_an_export() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "8M"]);
    place.ok(&["create", "b", "--size", "4M"]);
    place.ok(&["snapshot", "a"]);
    place.ok(&["snapshot", "a", "--label", "s"]);
    let list = place.tool("nbdinfo", &["--list", "--json", &place.url("")]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let exports = list["exports"].as_array().unwrap();
    let seen: Vec<(&str, bool)> = exports
        .iter()
        .map(|it| (it["export-name"].as_str().unwrap(), it["is_read_only"].as_bool().unwrap()))
        .collect();
    assert_eq!(seen, [("a", false), ("a@1", true), ("a@s", true), ("b", false)]);
    assert_eq!(exports[0]["export-size"], 8 << 20);
}

#[test]
fn further_addresses_are_served_too() {
    let place = Place::with_store("256M");
    let served = place.serve(&["--nbd", "unix:extra.sock", "--nbd", "tcp:127.0.0.1:0"]);
    place.ok(&["create", "a", "--size", "4M"]);
    let address =
        |index: usize| served.ready["daemon"]["nbd"][index]["address"].as_str().unwrap().to_owned();
    assert_eq!(address(1), format!("unix:{}", place.text("extra.sock")));
    let port = address(2);
    let port = port.strip_prefix("tcp:127.0.0.1:").unwrap();
    assert_ne!(port, "0", "the port that was found is told");
    for url in ["nbd+unix:///a?socket=extra.sock".to_owned(), format!("nbd://127.0.0.1:{port}/a")] {
        assert_eq!(place.tool("nbdinfo", &["--size", &url]).trim(), "4194304");
    }
    let port_taken = format!("tcp:127.0.0.1:{port}");
    place.ok(&["format", "second", "--size", "256M"]);
    let arguments = ["serve", "second", "--socket", "second.sock", "--nbd", &port_taken];
    let said = place.fails(3, &arguments);
    assert!(said.contains(&port_taken), "{said}");
    assert!(!place.path("second.sock").exists() && !place.path("second.nbd.sock").exists());
}

#[test]
fn plaintext_beyond_this_machine_takes_a_clear_word() {
    let place = Place::with_store("256M");
    let said = place.fails(1, &["serve", "store", "--nbd", "tcp:0.0.0.0:0"]);
    assert!(said.contains("--tls-dir") && said.contains("--insecure-plaintext"), "{said}");
    let served = place.serve(&["--nbd", "tcp:0.0.0.0:0", "--insecure-plaintext"]);
    assert_eq!(served.ready["daemon"]["nbd"][1]["tls"], false);
    served.stop();
}

#[test]
fn tls_lets_in_whom_it_should() {
    let place = Place::with_store("256M");
    let said =
        place.fails(1, &["serve", "store", "--nbd", "tcp:127.0.0.1:0", "--tls-dir", "nowhere"]);
    assert!(said.contains("nowhere/server-cert.pem"), "{said}");
    certificates(&place);
    for verify in [false, true] {
        let mut options = vec!["--nbd", "tcp:127.0.0.1:0", "--tls-dir", "tls"];
        options.extend(verify.then_some("--tls-client-ca"));
        let served = place.serve(&options);
        place.run(&["create", "a", "--size", "4M"]);
        let endpoint = &served.ready["daemon"]["nbd"][1];
        assert_eq!(endpoint["tls"], true);
        let port = endpoint["address"].as_str().unwrap().rsplit(':').next().unwrap();
        let size = |scheme: &str, certificates: &str| {
            let url = format!("{scheme}://localhost:{port}/a?tls-certificates={certificates}");
            let mut command = std::process::Command::new("nbdinfo");
            crate::place::Outcome::of(command.args(["--size", &url]).env("LC_ALL", "C")).code
        };
        assert_ne!(size("nbd", ""), Some(0), "plaintext is refused");
        assert_eq!(size("nbds", &place.text("client")), Some(0));
        let expected = if verify { Some(1) } else { Some(0) };
        assert_eq!(size("nbds", &place.text("anonymous")), expected, "no client certificate");
        // The daemon's own socket needs no TLS: its permissions protect it.
        assert_eq!(place.tool("nbdinfo", &["--size", &place.url("a")]).trim(), "4194304");
        served.stop();
    }
}

/// `tls` for the daemon, `client` with a certificate, `anonymous` without one.
fn certificates(place: &Place) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    for dir in ["tls", "client", "anonymous"] {
        std::fs::create_dir(place.path(dir)).unwrap();
        std::fs::write(place.path(&format!("{dir}/ca-cert.pem")), authority.pem()).unwrap();
    }
    for (dir, role) in [("tls", "server"), ("client", "client")] {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        let write = |what: &str, text: String| {
            std::fs::write(place.path(&format!("{dir}/{role}-{what}.pem")), text).unwrap();
        };
        write("cert", certificate.pem());
        write("key", key.serialize_pem());
    }
}
