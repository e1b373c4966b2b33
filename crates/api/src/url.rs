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

/// What was encoded by [`percent_encode`]; `None` if nothing was.
#[must_use]
pub fn percent_decode(encoded: &str) -> Option<String> {
    let mut parts = encoded.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let digits = part.get(..2).filter(|it| it.bytes().all(|b| b.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(part.get(2..)?.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unreserved_characters_stay() {
        assert_eq!(percent_encode("web-01_a.b~c"), "web-01_a.b~c");
        for text in ["", "web-01", "a b/ü?#%", "\u{0}"] {
            assert_eq!(percent_decode(&percent_encode(text)).as_deref(), Some(text));
        }
        for nonsense in ["%", "%4", "%zz", "%ff", "%+1"] {
            assert_eq!(percent_decode(nonsense), None, "{nonsense}");
        }
        assert_eq!(percent_encode("web01@be fore/ü?#%"), "web01%40be%20fore%2F%C3%BC%3F%23%25");
    }
}
