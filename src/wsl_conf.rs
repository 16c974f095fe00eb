//! /etc/wsl.conf, read as WSL reads it: WSL stops at the first line that it does not accept, and
//! what comes before counts. rust-ini's own parser accepts more than WSL does, and reads some of it
//! differently, so only its `Ini` is used, filled here. `tests/generate/wsl-conf-cases.json` is the
//! contract.

use ini::Ini;

/// The settings of wsl.conf that matter here, and where WSL stops reading it.
#[derive(Clone, Debug, PartialEq)]
pub struct WslConf {
    /// `[boot] protectBinfmt=`: whether the distro wants its interop protected.
    pub protect_binfmt: bool,
    /// `[interop] enabled=`: whether it wants Windows programs to start at all.
    pub interop_enabled: bool,
    /// The line, from 1, at which WSL stops reading.
    pub refused_line: Option<usize>,
}

impl Default for WslConf {
    fn default() -> WslConf {
        WslConf { protect_binfmt: true, interop_enabled: true, refused_line: None }
    }
}

impl WslConf {
    /// These settings as the text of a wsl.conf.
    pub fn text(&self) -> String {
        let WslConf { protect_binfmt, interop_enabled, .. } = self;
        format!("[boot]\nprotectBinfmt={protect_binfmt}\n[interop]\nenabled={interop_enabled}\n")
    }
}

/// Parses a wsl.conf. Every input has a meaning to WSL; bytes that are not ASCII are ordinary
/// characters of a value.
pub fn parse(bytes: &[u8]) -> WslConf {
    let mut reader = Reader { bytes, at: 0, section: None, settings: Ini::new() };
    let refused = reader.read().is_err();
    let value = |section, key| reader.settings.get_from(Some(section), key);
    WslConf {
        protect_binfmt: boolean(value("boot", "protectbinfmt")).unwrap_or(true),
        interop_enabled: boolean(value("interop", "enabled")).unwrap_or(true),
        refused_line: refused.then(|| reader.line()),
    }
}

fn boolean(value: Option<&str>) -> Option<bool> {
    match value?.to_ascii_lowercase().as_str() {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

/// WSL does not accept the input at this place.
struct Refused;

/// Follows WSL's `ParseConfigFile` character by character.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    section: Option<String>,
    /// The settings, with sections and keys in lower case, since WSL ignores case. If a key is
    /// repeated, `Ini` returns the first value, which also counts for WSL, even if it is invalid.
    settings: Ini,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek();
        self.at += usize::from(byte.is_some());
        byte
    }

    fn skip_while(&mut self, wanted: impl Fn(u8) -> bool) {
        while self.peek().is_some_and(&wanted) {
            self.at += 1;
        }
    }

    /// The number of the current line, from 1.
    fn line(&self) -> usize {
        let before = self.bytes.get(..self.at).unwrap_or_default();
        1 + before.iter().filter(|b| **b == b'\n').count()
    }

    /// Reads as far as WSL does.
    fn read(&mut self) -> Result<(), Refused> {
        while let Some(byte) = self.peek() {
            match byte {
                b' ' | b'\t' | b'\r' | b'\n' => self.at += 1,
                // A lone CR ends a value, but not a comment.
                b'#' => self.skip_while(|b| b != b'\n'),
                b'[' => self.section()?,
                _ => self.setting()?,
            }
        }
        Ok(())
    }

    fn section(&mut self) -> Result<(), Refused> {
        self.at += 1;
        let name = self.name()?;
        if self.next() != Some(b']') {
            return self.refuse_previous();
        }
        self.skip_while(is_blank);
        match self.peek() {
            None | Some(b'\n' | b'\r' | b'#') => self.section = Some(name),
            Some(_) => return Err(Refused),
        }
        Ok(())
    }

    fn setting(&mut self) -> Result<(), Refused> {
        let key = self.name()?;
        self.skip_while(is_blank);
        if self.next() != Some(b'=') {
            return self.refuse_previous();
        }
        self.skip_while(is_blank);
        let value = self.value()?;
        // WSL passes it on as a C string, which ends at the first NUL.
        let value = value.split(|b| *b == 0).next().unwrap_or_default();
        let value = String::from_utf8_lossy(value);
        let mut section = self.settings.with_section(self.section.clone());
        section.add(key, value);
        Ok(())
    }

    /// Reads a name: a letter, then letters and digits. Returns it in lower case.
    fn name(&mut self) -> Result<String, Refused> {
        if !self.peek().is_some_and(|b| b.is_ascii_alphabetic()) {
            return Err(Refused);
        }
        let start = self.at;
        self.skip_while(|b| b.is_ascii_alphanumeric());
        let name = self.bytes.get(start..self.at).unwrap_or_default();
        Ok(String::from_utf8_lossy(name).to_ascii_lowercase())
    }

    /// Reads a value to the end of the line or to a comment: without quotes, with escapes resolved,
    /// and without trailing blanks unless they were quoted or escaped.
    fn value(&mut self) -> Result<Vec<u8>, Refused> {
        let mut value = Vec::new();
        let mut length_without_blanks = 0;
        let mut quoted = false;
        loop {
            match self.peek() {
                None | Some(b'\n' | b'\r') => break,
                Some(b'#') if !quoted => break,
                Some(b'"') => {
                    quoted = !quoted;
                    self.at += 1;
                }
                Some(b'\\') => {
                    self.at += 1;
                    match self.next() {
                        Some(b @ (b'\\' | b'"')) => value.push(b),
                        Some(b'b') => value.push(b'\x08'),
                        Some(b'n') => value.push(b'\n'),
                        Some(b't') => value.push(b'\t'),
                        // The line continues. Of CR LF only the CR is consumed, so the LF ends it.
                        Some(b'\r' | b'\n') => {}
                        _ => return self.refuse_previous(),
                    }
                }
                Some(b) => {
                    value.push(b);
                    self.at += 1;
                    if is_blank(b) {
                        continue;
                    }
                }
            }
            length_without_blanks = value.len();
        }
        if quoted {
            return Err(Refused);
        }
        value.truncate(length_without_blanks);
        Ok(value)
    }

    /// Refuses the byte just read, so that `line` counts the line that it is on.
    fn refuse_previous<T>(&mut self) -> Result<T, Refused> {
        self.at = self.at.saturating_sub(1);
        Err(Refused)
    }
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wsl_conf_is_read_as_wsl_reads_it() {
        let table = include_str!("../tests/generate/wsl-conf-cases.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(table).unwrap();
        assert_eq!(cases.len(), 64);
        for case in cases {
            let conf = parse(case["text"].as_str().unwrap().as_bytes());
            let read = (conf.protect_binfmt, conf.interop_enabled);
            let expected = (
                case["protectBinfmt"].as_bool().unwrap(),
                case["interopEnabled"].as_bool().unwrap(),
            );
            assert_eq!(read, expected, "{}", case["name"]);
            let stops = case["name"].as_str().unwrap().contains("stops reading");
            assert!(!stops || conf.refused_line.is_some(), "{}", case["name"]);
        }
    }

    #[test]
    fn the_line_at_which_wsl_stops_is_named() {
        for (text, line) in [
            ("[boot]\nsystemd=true\n; x\n", Some(3)),
            ("[boot]\ncommand=\"a\nsystemd=true\n", Some(2)),
            ("[boot]\ncommand=a \\\n \\x\n", Some(3)),
            ("[boot]\nfoo\n", Some(2)),
            ("[boot", Some(1)),
            ("[boot]\ncommand=a\\", Some(2)),
            ("\n\n# x\n[boot]\nsystemd=true # y\n", None),
        ] {
            assert_eq!(parse(text.as_bytes()).refused_line, line, "{text:?}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_ordinary_characters() {
        let conf = parse(b"# gr\xf6\xdfe\n[user]\ndefault=j\xf6rg\n[boot]\nprotectBinfmt=0\n");
        assert!(!conf.protect_binfmt);
        let conf = parse(b"[boot]\nprotectBinfmt=0\n\xff\n");
        assert_eq!((conf.protect_binfmt, conf.refused_line), (false, Some(3)));
    }
}
