//! What `status` says: the findings, the verdict that follows from them, and both output formats.

use std::fmt::Write;

use crate::wsl::Verdict;

/// One result of a check.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The check's name, which scripts may rely on.
    pub check: &'static str,
    /// How serious it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What fixes it.
    pub mend: Option<Mend>,
}

/// How serious a finding is, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It is as it should be.
    Good,
    /// Worth knowing, but not a fault.
    Note,
    /// It could not be checked.
    Unknown,
    /// Windows programs are protected, but something else needs fixing.
    Degraded,
    /// They start, but may stop working at any time.
    Unprotected,
    /// They do not start, or something else gets them.
    Broken,
}

/// What fixes a finding.
#[derive(Clone, Debug, PartialEq)]
pub enum Mend {
    /// A shell command for root.
    AsRoot(String),
    /// A shell command for the calling shell.
    InShell(String),
    /// A file to edit, and how.
    Edit(String),
    /// Something that no command can do.
    ByHand(String),
}

impl Finding {
    /// A finding of any state, without a fix.
    pub fn new(check: &'static str, state: State, found: impl Into<String>) -> Finding {
        Finding { check, state, found: found.into(), mend: None }
    }

    /// As it should be.
    pub fn good(check: &'static str, found: impl Into<String>) -> Finding {
        Finding::new(check, State::Good, found)
    }

    /// Worth knowing.
    pub fn note(check: &'static str, found: impl Into<String>) -> Finding {
        Finding::new(check, State::Note, found)
    }

    /// Impossible to check.
    pub fn unknown(check: &'static str, found: impl Into<String>) -> Finding {
        Finding::new(check, State::Unknown, found)
    }

    /// Impossible to check for anybody but root.
    pub fn denied(check: &'static str, path: &str) -> Finding {
        Finding::unknown(check, format!("{path}: only root can read it"))
            .by_hand("run this again as root, with sudo")
    }

    /// Adds a shell command for root that fixes it. A command that cannot be shown as it would be
    /// run is not advised.
    pub fn by_root(mut self, command: impl Into<String>) -> Finding {
        let command = command.into();
        if printable(&command) != command {
            return self.by_hand("remove it; its name is not printable, but \"ls -b\" escapes it");
        }
        self.mend = Some(Mend::AsRoot(command));
        self
    }

    /// Adds a shell command for the calling shell.
    pub fn in_shell(mut self, command: String) -> Finding {
        self.mend = Some(Mend::InShell(command));
        self
    }

    /// Adds a file to edit, and how.
    pub fn edit(mut self, how: String) -> Finding {
        self.mend = Some(Mend::Edit(how));
        self
    }

    /// Adds something that no command can do.
    pub fn by_hand(mut self, deed: impl Into<String>) -> Finding {
        self.mend = Some(Mend::ByHand(deed.into()));
        self
    }
}

/// Everything that `status` says.
pub struct Report {
    /// The verdict as a word, for scripts.
    pub verdict: &'static str,
    /// The verdict as a sentence, for people.
    pub summary: String,
    /// Whether there is nothing to fix.
    pub healthy: bool,
    /// One line each.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Derives the verdict. `interop` is whether the distro wants Windows programs to start.
    pub fn of(findings: Vec<Finding>, interop: bool) -> Report {
        let worst = findings.iter().map(|finding| finding.state).max();
        let worst = worst.unwrap_or(State::Good);
        let (verdict, summary) = match (worst, interop) {
            (State::Broken, _) => ("broken", "Windows programs do not start properly."),
            (State::Unprotected, true) => (
                "unprotected",
                "Windows programs start, but nothing protects them: they may stop working at any \
                 time.",
            ),
            (State::Unprotected, false) => (
                "unprotected",
                "Windows interop is switched off here, but Windows programs may stop working in \
                 other distros at any time.",
            ),
            (State::Degraded, _) => {
                ("degraded", "Windows programs are protected, but something else needs fixing.")
            }
            (State::Unknown, _) => ("unknown", "Not everything could be checked."),
            (_, true) => ("healthy", "Windows programs start and are protected."),
            (_, false) => {
                ("off", "Windows interop is switched off here; other distros are protected.")
            }
        };
        let next = match worst {
            State::Good | State::Note => "",
            State::Unknown => " See the lines marked \"unknown\".",
            _ => " Apply the fixes below, from top to bottom.",
        };
        Report {
            verdict,
            summary: format!("{summary}{next}"),
            healthy: worst < State::Unknown,
            findings,
        }
    }

    /// The report outside a WSL2 distro.
    pub fn elsewhere(verdict: &Verdict) -> Report {
        let (word, summary) = match verdict {
            Verdict::Wsl1 => (
                "wsl1",
                "This is WSL1, which neither runs systemd nor shares its table: nothing to do.",
            ),
            Verdict::Container => {
                ("container", "This is a container on WSL's kernel: nothing to do.")
            }
            Verdict::Initrd => ("initrd", "This is the initrd: nothing to do."),
            _ => ("not-wsl", "This is not WSL: nothing to do."),
        };
        Report { verdict: word, summary: summary.to_owned(), healthy: true, findings: Vec::new() }
    }

    /// The format for people: the verdict, then a line for each finding, and one for each fix.
    pub fn text(&self, coloured: bool) -> String {
        let mut text = printable(&self.summary) + "\n\n";
        for (at, finding) in self.findings.iter().enumerate() {
            let (word, colour) = match finding.state {
                State::Good => ("ok", 32),
                State::Note => ("note", 36),
                State::Unknown => ("unknown", 35),
                State::Degraded | State::Unprotected => ("warning", 33),
                State::Broken => ("error", 31),
            };
            let mut line = |word: &str, first: &str, second: &str| {
                let (on, off) = match coloured {
                    true => (format!("\x1b[{colour}m"), "\x1b[m"),
                    false => (String::new(), ""),
                };
                let second = printable(second);
                let rest = format!("{first:15}  {second}");
                let _ = writeln!(text, "{on}{word:7}{off}  {}", rest.trim_end());
            };
            line(word, finding.check, &finding.found);
            // The same fix need not be applied twice, and may fail the second time.
            let mut before = self.findings.iter().take(at);
            if before.any(|earlier| earlier.mend.is_some() && earlier.mend == finding.mend) {
                line("  fix", "as above", "");
            } else if let Some(mend) = &finding.mend {
                let (how, what) = mend.parts();
                let how = how.trim_start_matches("run-").replace('-', " ");
                let is_note = finding.state == State::Note;
                line(if is_note { "  hint" } else { "  fix" }, &how, what);
            }
        }
        match self.findings.is_empty() {
            true => text.trim_end().to_owned() + "\n",
            false => text,
        }
    }

    /// The format for scripts: one object on one line, described by docs/status.schema.json.
    pub fn json(&self) -> String {
        let finding = |finding: &Finding| {
            let state = match finding.state {
                State::Good => "good",
                State::Note => "note",
                State::Unknown => "unknown",
                _ => "bad",
            };
            let (check, found) = (quote(finding.check), quote(&finding.found));
            let mend = finding.mend.as_ref().map(|mend| {
                let (how, what) = mend.parts();
                format!("{{\"how\":{},\"what\":{}}}", quote(how), quote(what))
            });
            let mend = mend.unwrap_or("null".to_owned());
            format!("{{\"check\":{check},\"state\":\"{state}\",\"found\":{found},\"mend\":{mend}}}")
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
    /// How to fix it, as a word for scripts, and what to do.
    fn parts(&self) -> (&'static str, &str) {
        match self {
            Mend::AsRoot(command) => ("run-as-root", command),
            Mend::InShell(command) => ("run-in-this-shell", command),
            Mend::Edit(file) => ("edit", file),
            Mend::ByHand(deed) => ("by-hand", deed),
        }
    }
}

/// Masks control characters and changes of text direction: other people choose the names in the
/// table and the paths, and could use them to trick a terminal or its reader.
fn printable(text: &str) -> String {
    let tricky = |c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    let mask = |c: char| if c.is_control() || tricky(c) { '?' } else { c };
    text.chars().map(mask).collect()
}

/// Quotes a name for a shell command, whatever it contains.
pub fn word(text: impl AsRef<str>) -> String {
    let text = text.as_ref();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._:@+=-".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// Quotes a JSON string, RFC 8259.
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
        let finding = |state: &State| Finding::new("entry", *state, "x".to_owned());
        Report::of(states.iter().map(finding).collect(), true)
    }

    #[test]
    fn the_gravest_finding_decides_and_the_unknown_is_never_healthy() {
        use State::{Broken, Degraded, Good, Note, Unknown, Unprotected};
        for (states, verdict) in [
            (&[] as &[State], "healthy"),
            (&[Good, Note], "healthy"),
            (&[Good, Unknown], "unknown"),
            (&[Unknown, Degraded], "degraded"),
            (&[Degraded, Unprotected], "unprotected"),
            (&[Unprotected, Broken, Degraded], "broken"),
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
        let line = "\n\nnote     entry            ?[2J?x?\n";
        assert!(report.text(false).ends_with(line));
        let coloured = report.text(true);
        assert!(coloured.contains("\x1b[36mnote   \x1b[m  entry            ?[2J"));
    }

    #[test]
    fn a_word_is_one_to_the_shell() {
        for text in ["/a/b-1.conf", "a b", "$(id)", "it's", "", "a\nb'\u{202e}"] {
            let command = format!("printf %s {}", word(text));
            let shell = std::process::Command::new("sh").args(["-c", &command]).output();
            assert_eq!(shell.unwrap().stdout, text.as_bytes(), "{command}");
        }
        let finding = Finding::note("entry", "x").by_root("rm 'a\nb'");
        assert!(matches!(finding.mend, Some(Mend::ByHand(_))));
    }

    #[test]
    fn any_text_comes_through_json() {
        let text: String = (0u8..=255).map(char::from).collect::<String>() + "\u{1f600}";
        let mut report = of(&[State::Good, State::Broken]);
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
