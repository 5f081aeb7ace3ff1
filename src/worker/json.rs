//! JSON of unknown origin, checked before it is used: size, depth, number of values, no key twice.

use std::{collections::HashSet, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

/// Deepest nesting. Tokenizers nest about ten deep.
const DEEPEST: u32 = 64;
/// Most values. A vocabulary of a million entries with its merges stays below.
const MOST_VALUES: u32 = 10_000_000;

/// Checks a document.
///
/// # Errors
/// Says what is wrong and where.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let mut values = 0;
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    Walk {
        values: &mut values,
        depth: 0,
    }
    .deserialize(&mut reader)
    .and_then(|()| reader.end())
    .map_err(|e| e.to_string())
}

struct Walk<'a> {
    values: &'a mut u32,
    depth: u32,
}

impl Walk<'_> {
    fn inner(&mut self) -> Walk<'_> {
        Walk {
            values: self.values,
            depth: self.depth + 1,
        }
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(), D::Error> {
        *self.values += 1;
        if *self.values > MOST_VALUES {
            return Err(D::Error::custom(format!("more than {MOST_VALUES} values")));
        }
        if self.depth > DEEPEST {
            return Err(D::Error::custom(format!("nested deeper than {DEEPEST}")));
        }
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(self.inner())?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value_seed(self.inner())?;
            if let Some(twice) = seen.replace(key) {
                let twice: String = twice.chars().take(60).collect();
                return Err(A::Error::custom(format!("key {twice:?} is there twice")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn ordinary_documents_pass() {
        for good in [
            "{}",
            "[1, -2, 3.5, true, null, \"a\"]",
            r#"{"a":{"b":[{"a":1},{"a":1}]}}"#,
        ] {
            assert_eq!(check(good.as_bytes()), Ok(()), "{good}");
        }
    }

    #[test]
    fn keys_twice_depth_and_rubbish_are_refused() {
        let deep = "[".repeat(10_000);
        let nested = format!("{}1{}", "[".repeat(70), "]".repeat(70));
        for (bad, wanted) in [
            (r#"{"a":1,"b":2,"a":3}"#, "twice"),
            (r#"[{"x":{"k":1,"k":1}}]"#, "twice"),
            (&nested, "deeper"),
            (&deep, ""),
            ("{} {}", ""),
            ("", ""),
            ("\u{0}", ""),
        ] {
            let got = check(bad.as_bytes()).unwrap_err();
            assert!(got.contains(wanted), "{got}");
        }
    }
}
