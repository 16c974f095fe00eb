//! What `status` says: findings, the verdict that follows from them, and their two forms.

use std::fmt::Write;

/// What one check found.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The check's name, which scripts may rely on.
    pub check: &'static str,
    /// What to think of it.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What mends it.
    pub mend: Option<Mend>,
}

/// What to think of a finding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    /// It is as it should be.
    Good,
    /// It is not, and does this harm.
    Bad(Harm),
    /// Worth knowing, and no fault.
    Note,
    /// It could not be found out.
    Unknown,
}

/// What harm is done, the gravest first.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub enum Harm {
    /// Windows programs do not start, or something else gets them.
    Broken,
    /// They do, but something may end that at any time.
    Unprotected,
    /// They do, and are protected; something beside them is out of order.
    Degraded,
}

/// What mends a finding.
#[derive(Clone, Debug, PartialEq)]
pub enum Mend {
    /// A shell command for root.
    AsRoot(String),
    /// A shell command for the shell that asked.
    InShell(String),
    /// A file to be edited, and how.
    Edit(String),
    /// Something that no command does.
    ByHand(String),
}

impl Finding {
    /// As it should be.
    pub fn good(check: &'static str, found: impl Into<String>) -> Finding {
        Finding::new(check, State::Good, found)
    }

    /// Not as it should be, and this mends it.
    pub fn bad(check: &'static str, harm: Harm, found: impl Into<String>, mend: Mend) -> Finding {
        Finding::new(check, State::Bad(harm), found).mended_by(mend)
    }

    /// Worth knowing.
    pub fn note(check: &'static str, found: impl Into<String>) -> Finding {
        Finding::new(check, State::Note, found)
    }

    /// Not to be found out.
    pub fn unknown(check: &'static str, found: impl Into<String>) -> Finding {
        Finding::new(check, State::Unknown, found)
    }

    fn new(check: &'static str, state: State, found: impl Into<String>) -> Finding {
        Finding {
            check,
            state,
            found: found.into(),
            mend: None,
        }
    }

    /// The same, with what mends it.
    pub fn mended_by(mut self, mend: Mend) -> Finding {
        self.mend = Some(mend);
        self
    }
}

/// The whole answer.
pub struct Report {
    /// The verdict in a word, for scripts.
    pub verdict: &'static str,
    /// The verdict in a sentence, for people.
    pub summary: String,
    /// Whether there is nothing to mend.
    pub healthy: bool,
    /// A line each.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The verdict that follows from what was found in a distro that wants Windows programs to
    /// start, or does not.
    pub fn of(findings: Vec<Finding>, interop: bool) -> Report {
        let harm = findings.iter().filter_map(|finding| match finding.state {
            State::Bad(harm) => Some(harm),
            _ => None,
        });
        let worst = harm.fold(None, |worst: Option<Harm>, harm| match worst {
            Some(worst) if worst <= harm => Some(worst),
            _ => Some(harm),
        });
        let unknown = findings.iter().any(|f| f.state == State::Unknown);
        let (verdict, summary) = match worst {
            Some(Harm::Broken) => ("broken", "Windows programs do not start as they should."),
            Some(Harm::Unprotected) if interop => (
                "unprotected",
                "Windows programs are not protected: any time they may start no longer.",
            ),
            Some(Harm::Unprotected) => (
                "unprotected",
                "Interop is switched off here, and the other distros are not protected.",
            ),
            Some(Harm::Degraded) if unknown => (
                "degraded",
                "Not all is in order, and not everything could be found out.",
            ),
            Some(Harm::Degraded) => (
                "degraded",
                "Windows programs are protected, but not all is in order.",
            ),
            None if unknown => ("unknown", "Not everything could be found out."),
            None if interop => ("healthy", "Windows programs start, and are protected."),
            None => (
                "off",
                "Interop is switched off here, and the other distros are protected.",
            ),
        };
        Report {
            verdict,
            summary: summary.to_owned(),
            healthy: worst.is_none() && !unknown,
            findings,
        }
    }

    /// For people: the verdict, then a line a finding.
    pub fn text(&self, coloured: bool) -> String {
        let mut text = printable(&self.summary) + "\n";
        for finding in &self.findings {
            let (word, colour) = match finding.state {
                State::Good => ("good", 32),
                State::Bad(_) => ("bad", 31),
                State::Note => ("note", 36),
                State::Unknown => ("unknown", 33),
            };
            let (on, off) = match coloured {
                true => (format!("\x1b[{colour}m"), "\x1b[m"),
                false => (String::new(), ""),
            };
            let check = finding.check;
            let found = printable(&finding.found);
            let _ = write!(text, "{on}{word:7}{off}  {check:15}  {found}");
            if let Some(mend) = &finding.mend {
                let (how, what) = mend.parts();
                let how = how.replace('-', " ");
                let _ = write!(text, "; {how}: {}", printable(what));
            }
            text.push('\n');
        }
        text
    }

    /// For scripts: one object on one line, as docs/status.schema.json has it.
    pub fn json(&self) -> String {
        let finding = |finding: &Finding| {
            let state = match finding.state {
                State::Good => "good",
                State::Bad(_) => "bad",
                State::Note => "note",
                State::Unknown => "unknown",
            };
            let mend = match &finding.mend {
                None => "null".to_owned(),
                Some(mend) => {
                    let (how, what) = mend.parts();
                    format!("{{\"how\":{},\"what\":{}}}", quote(how), quote(what))
                }
            };
            format!(
                "{{\"check\":{},\"state\":{},\"found\":{},\"mend\":{mend}}}",
                quote(finding.check),
                quote(state),
                quote(&finding.found)
            )
        };
        let checks: Vec<String> = self.findings.iter().map(finding).collect();
        format!(
            "{{\"verdict\":{},\"summary\":{},\"healthy\":{},\"checks\":[{}]}}\n",
            quote(self.verdict),
            quote(&self.summary),
            self.healthy,
            checks.join(",")
        )
    }
}

impl Mend {
    /// How, in a word for scripts, and what.
    fn parts(&self) -> (&'static str, &str) {
        match self {
            Mend::AsRoot(command) => ("run-as-root", command),
            Mend::InShell(command) => ("run-in-this-shell", command),
            Mend::Edit(file) => ("edit", file),
            Mend::ByHand(deed) => ("by-hand", deed),
        }
    }
}

/// Names in the table and paths are other people's: none of them may play tricks on a terminal, nor
/// by the direction of what is written.
fn printable(text: &str) -> String {
    let tricky = |c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    let mask = |c: char| if c.is_control() || tricky(c) { '?' } else { c };
    text.chars().map(mask).collect()
}

/// A word of a shell command that is to be run just so, whatever is in a name.
pub fn word(text: impl AsRef<str>) -> String {
    let text = text.as_ref();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._:@+=-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    if text
        .chars()
        .all(|c| printable(c.encode_utf8(&mut [0; 4])) != "?" || c == '?')
    {
        return format!("'{}'", text.replace('\'', r"'\''"));
    }
    // What is shown has to be what is run, in any shell.
    let mut word = String::from("\"$(printf '");
    let kept = text.trim_end_matches('\n');
    for byte in kept.bytes() {
        // Not '-', with which an option would begin.
        if byte.is_ascii_graphic() && byte != b'-' && plain(byte.into()) {
            word.push(byte.into());
        } else {
            let _ = write!(word, "\\{byte:03o}");
        }
    }
    // A substitution loses newlines at its end. A shell that does not know these quotes comes to a
    // word that is nothing's name.
    word + "')\"" + &r"$'\012'".repeat(text.len() - kept.len())
}

/// A string of JSON, RFC 8259.
fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(states: &[State]) -> Report {
        let finding = |state: &State| Finding::new("entry", *state, "x");
        Report::of(states.iter().map(finding).collect(), true)
    }

    #[test]
    fn the_gravest_finding_decides_and_the_unknown_is_never_healthy() {
        use Harm::{Broken, Degraded, Unprotected};
        use State::{Bad, Good, Note, Unknown};
        for (states, verdict) in [
            (&[] as &[State], "healthy"),
            (&[Good, Note], "healthy"),
            (&[Good, Unknown], "unknown"),
            (&[Unknown, Bad(Degraded)], "degraded"),
            (&[Bad(Degraded), Bad(Unprotected)], "unprotected"),
            (&[Bad(Unprotected), Bad(Broken), Bad(Degraded)], "broken"),
        ] {
            let report = of(states);
            assert_eq!(report.verdict, verdict, "{states:?}");
            assert_eq!(report.healthy, verdict == "healthy", "{states:?}");
        }
        assert_eq!(Report::of(Vec::new(), false).verdict, "off");
        assert!(Report::of(Vec::new(), false).healthy);
    }

    #[test]
    fn nothing_in_a_text_reaches_the_terminal_as_a_command() {
        let mut report = of(&[State::Note]);
        report.findings[0].found = "\x1b[2J\nx\u{9b}".to_owned();
        let line = "note     entry            ?[2J?x?\n";
        assert!(report.text(false).ends_with(&format!("\n{line}")));
        let coloured = report.text(true);
        assert!(coloured.contains("\x1b[36mnote   \x1b[m  entry            ?[2J"));
    }

    #[test]
    fn a_word_is_one_to_the_shell() {
        for (text, expected) in [
            ("/a/b-1.conf", "/a/b-1.conf"),
            ("a b", "'a b'"),
            ("$(id)", "'$(id)'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("a\nb'\u{202e}", r#""$(printf 'a\012b\047\342\200\256')""#),
            ("a\n\n", r#""$(printf 'a')"$'\012'$'\012'"#),
            ("-v\n-", r#""$(printf '\055v\012\055')""#),
        ] {
            assert_eq!(word(text), expected);
            let command = format!("printf %s {expected}");
            let output = std::process::Command::new("bash")
                .args(["-c", &command])
                .output();
            assert_eq!(output.unwrap().stdout, text.as_bytes(), "{expected}");
        }
    }

    #[test]
    fn any_text_comes_through_json() {
        let text: String = (0u8..=255).map(char::from).collect::<String>() + "\u{1f600}";
        let mut report = of(&[State::Good, State::Bad(Harm::Broken)]);
        report.findings[0].found = text.clone();
        report.findings[1].mend = Some(Mend::Edit(text.clone()));
        let json = report.json();
        assert_eq!(json.lines().count(), 1);
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read["checks"][0]["found"], *text);
        assert_eq!(read["checks"][1]["mend"]["what"], *text);
        assert_eq!(read["healthy"], false);
    }
}
