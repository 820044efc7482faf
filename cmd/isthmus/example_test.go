package main

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

// shellWords splits a line as a shell does, as far as examples go: quotes, comments, and one
// command for each part of a pipe. Redirections are left out.
func shellWords(line string) (commands [][]string) {
	var words []string
	var word strings.Builder
	quote, inWord, redirect := rune(0), false, false
	endWord := func() {
		if inWord && !redirect {
			words = append(words, word.String())
		}
		if inWord {
			redirect = false
		}
		word.Reset()
		inWord = false
	}
	for _, r := range line {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quote, inWord = r, true
		case r == ' ':
			endWord()
		case r == '#' && !inWord:
			return append(commands, words)
		case r == '|':
			endWord()
			commands, words = append(commands, words), nil
		case r == '>' || r == '<':
			endWord()
			redirect = true
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	endWord()
	return append(commands, words)
}

// TestExamples: each command has three examples, which it accepts: the command exists, and so do
// the flags, with values of their types, and there are as many arguments as it takes.
func TestExamples(t *testing.T) {
	fresh := func() *cobra.Command {
		a := &app{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, now: time.Now, wall: time.Now, getenv: func(string) string { return "" }}
		return a.command()
	}
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			visit(sub)
		}
		path := strings.TrimPrefix(c.CommandPath(), "isthmus ")
		if c.HasSubCommands() || !c.Runnable() || c.Hidden || strings.HasPrefix(path, "completion") || path == "help" {
			return
		}
		need, own := 3, 0
		for line := range strings.Lines(c.Example) {
			line = strings.TrimRight(line, "\n")
			if !strings.HasPrefix(line, "  ") || strings.TrimSpace(line) == "" {
				t.Errorf("%s: the line %q is not indented by two spaces", path, line)
			}
			for _, words := range shellWords(strings.TrimSpace(line)) {
				if len(words) > 0 && words[0] == "sudo" {
					words = words[1:]
				}
				if len(words) == 0 || words[0] != "isthmus" {
					continue
				}
				of, rest, err := fresh().Find(words[1:])
				if err == nil {
					err = of.ParseFlags(rest)
				}
				if err == nil {
					err = of.ValidateArgs(of.Flags().Args())
				}
				if err == nil {
					err = of.ValidateRequiredFlags()
				}
				if err == nil {
					err = of.ValidateFlagGroups()
				}
				if err != nil || !of.Runnable() || of.HasSubCommands() {
					t.Errorf("%s: the example %q is not a command: %v", path, line, err)
				} else if of.CommandPath() == c.CommandPath() {
					own++
				}
			}
		}
		if own < need {
			t.Errorf("isthmus %s has %d examples, want %d", path, own, need)
		}
	}
	visit(fresh())
	for path := range examples {
		if c, rest, err := fresh().Find(strings.Fields(path)); err != nil || len(rest) > 0 || c.HasSubCommands() {
			t.Errorf("there are examples of %q, which is not a command", path)
		}
	}
}
