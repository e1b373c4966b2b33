//! Percent-encoding of names in URLs.

use std::fmt::Write;

/// Encodes `text` so that it stands for itself anywhere in a URL (RFC 3986, section 2.3: all but
/// the unreserved characters are encoded).
#[must_use]
pub fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a `String` cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unreserved_characters_stay() {
        assert_eq!(percent_encode("web-01_a.b~c"), "web-01_a.b~c");
        assert_eq!(percent_encode("web01@be fore/ü?#%"), "web01%40be%20fore%2F%C3%BC%3F%23%25");
    }
}
