//! Completion of the plugin: scripts of shells for the command `kubectl-lxcfs`, and words for
//! kubectl, which completes `kubectl lxcfs` by the program `kubectl_complete-lxcfs` (kubectl 1.26).

use clap::{Arg, Command, CommandFactory};

use crate::args::kubectl::{PROGRAM, Plugin, Shell};

/// The last line for kubectl: no names of files (`ShellCompDirectiveNoFileComp` of its library
/// cobra).
const NO_FILES: &str = ":4";

pub(super) fn script(shell: Shell) -> Vec<u8> {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Fish => clap_complete::Shell::Fish,
        Shell::Zsh => clap_complete::Shell::Zsh,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Plugin::command(), PROGRAM, &mut script);
    script
}

/// The answer to kubectl: a line for each word that the last of these may become.
pub(super) fn words(words: &[String]) -> String {
    let mut command = Plugin::command();
    command.build();
    let candidates = candidates(&command, words);
    candidates.into_iter().chain([NO_FILES.to_owned()]).map(|line| line + "\n").collect()
}

fn candidates(command: &Command, words: &[String]) -> Vec<String> {
    let (last, before) = words.split_last().map_or(("", words), |(l, before)| (l.as_str(), before));
    let mut command = command;
    // The flag whose value is next.
    let mut flag: Option<&Arg> = None;
    for word in before {
        if flag.take().is_some() {
            continue;
        }
        let names = |arg: &&Arg| {
            let long = arg.get_long().is_some_and(|long| word.strip_prefix("--") == Some(long));
            let short = arg.get_short().is_some_and(|short| *word == format!("-{short}"));
            (long || short) && arg.get_action().takes_values()
        };
        flag = command.get_arguments().find(names);
        command = command.find_subcommand(word).unwrap_or(command);
    }
    let values = |arg: &Arg| -> Vec<String> {
        let values = arg.get_possible_values().into_iter().filter(|value| !value.is_hide_set());
        values.map(|value| value.get_name().to_owned()).collect()
    };
    let all: Vec<String> = match flag {
        Some(flag) => values(flag),
        None if last.starts_with('-') => {
            let flags = command.get_arguments().filter_map(|arg| arg.get_long());
            flags.map(|long| format!("--{long}")).collect()
        }
        None => {
            let names = command.get_subcommands().map(|command| command.get_name().to_owned());
            names.chain(command.get_positionals().flat_map(values)).collect()
        }
    };
    all.into_iter().filter(|word| word.starts_with(last)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_gets_the_words_that_fit() {
        for (line, expected) in [
            (&["ex"][..], "explain\n:4\n"),
            (&["explain", ""], "pod\nhelp\n:4\n"),
            (&["-n", "status", "che"], "check\n:4\n"),
            (&["status", "-o", ""], "text\njson\nyaml\n:4\n"),
            (&["status", "--output", "y"], "yaml\n:4\n"),
            (&["status", "--no"], "--node\n:4\n"),
            (&["completion", "z"], "zsh\n:4\n"),
            (&["inject", ""], ":4\n"),
        ] {
            let line: Vec<String> = line.iter().map(|&word| word.to_owned()).collect();
            assert_eq!(words(&line), expected, "{line:?}");
        }
        assert!(words(&[]).starts_with("explain\nstatus\n"));
    }
}
