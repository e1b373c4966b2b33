//! The control plane as other programs meet it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::place::Place;

/// One request: status and body.
pub(crate) fn request(place: &Place, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(place.path("control.sock")).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

#[test]
fn every_failure_has_one_shape() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    let create = r#"{"name":"a","size_bytes":4096}"#;
    assert_eq!(request(&place, "POST", "/v1/vdis", create).0, 201);
    for (method, path, body, status, kind) in [
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("GET", "/", "", 404, "not_found"),
        ("PUT", "/v1/vdis", "", 501, "unsupported"),
        ("GET", "/v1/vdis/b", "", 404, "not_found"),
        ("GET", "/v1/vdis?max=x", "", 400, "invalid"),
        ("GET", "/v1/vdis/a/snapshots/1", "", 404, "not_found"),
        ("GET", "/v1/diff?from=a", "", 400, "invalid"),
        ("POST", "/v1/vdis", create, 409, "exists"),
        ("POST", "/v1/vdis", "{", 400, "invalid"),
        ("POST", "/v1/vdis", r#"{"name":"b"}"#, 400, "invalid"),
        ("POST", "/v1/vdis", r#"{"name":"b","size_bytes":1,"source":"a"}"#, 400, "invalid"),
        ("POST", "/v1/vdis", r#"{"name":"b","size_bytes":-1}"#, 400, "invalid"),
        ("POST", "/v1/vdis", r#"{"name":"b","size_bytes":1,"colour":2}"#, 400, "invalid"),
        ("PATCH", "/v1/vdis/a", "{}", 400, "invalid"),
        ("PATCH", "/v1/vdis/a", r#"{"name":"b","size_bytes":8192}"#, 400, "invalid"),
        ("POST", "/v1/vdis/a/rollback", r#"{"snapshot":"x"}"#, 404, "not_found"),
        ("POST", "/v1/attachments", r#"{"disk":"a","vhost_user":"relative"}"#, 400, "invalid"),
        ("POST", "/v1/attachments", r#"{"disk":"a"}"#, 400, "invalid"),
        (
            "POST",
            "/v1/attachments",
            r#"{"disk":"a","vhost_user":"/x","ublk":true}"#,
            400,
            "invalid",
        ),
        ("DELETE", "/v1/attachments/%2Frun%2Fnothing", "", 404, "not_found"),
    ] {
        let (got, error) = request(&place, method, path, body);
        assert_eq!(
            (got, &error["kind"]),
            (status, &json!(kind)),
            "{method} {path} {body}: {error}"
        );
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
}

#[test]
fn what_the_nbd_server_counts_can_be_read() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    place.ok(&["create", "a", "--size", "1M"]);
    place.write("a", 1, 0, 65_536);
    let (status, metrics) = request(&place, "GET", "/v1/nbd", "");
    assert_eq!((status, &metrics["nbd_written_bytes_total"]), (200, &json!(65_536)), "{metrics}");
    assert!(metrics["nbd_flush_requests_total"].as_u64().unwrap() > 0, "{metrics}");
}

#[test]
fn pages_follow_each_other() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    for name in ["a", "b", "c"] {
        place.ok(&["create", name, "--size", "1M"]);
        place.ok(&["snapshot", "a"]);
    }
    let (_, page) = request(&place, "GET", "/v1/vdis?max=2", "");
    assert_eq!((&page["vdis"][1]["name"], &page["next"]), (&json!("b"), &json!("b")));
    let (_, page) = request(&place, "GET", "/v1/vdis?max=2&after=b", "");
    assert_eq!((&page["vdis"][0]["name"], &page["next"]), (&json!("c"), &json!(null)));
    let (_, page) = request(&place, "GET", "/v1/vdis/a/snapshots?max=2", "");
    assert_eq!(page["next"], 2);
    let (_, page) = request(&place, "GET", "/v1/vdis/a/snapshots?max=2&after=2", "");
    assert_eq!(page["snapshots"].as_array().unwrap().len(), 1);
    for block in 0..3 {
        place.write("a", 1, block << 13, 4096);
    }
    let extent = |offset| json!({ "offset": offset, "length": 4096, "data": true });
    let (_, page) = request(&place, "GET", "/v1/diff?from=b&to=a&max=2", "");
    assert_eq!(
        (&page["extents"], &page["next"]),
        (&json!([extent(0), extent(8192)]), &json!(16_384))
    );
    let (_, page) = request(&place, "GET", "/v1/diff?from=b&to=a&max=2&after=16384", "");
    assert_eq!((&page["extents"], &page["next"]), (&json!([extent(16_384)]), &json!(null)));
    for max in ["0", "1000000"] {
        let (_, page) = request(&place, "GET", &format!("/v1/diff?from=b&to=a&max={max}"), "");
        assert_eq!(page["extents"][0], extent(0), "{max}");
    }
    let (_, daemon) = request(&place, "GET", "/v1/daemon", "");
    assert_eq!(daemon["nbd"][0]["address"], format!("unix:{}", place.text("control.nbd.sock")));
}
