package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// plainUsage makes a command and those below it report wrong usage in words, in place of cobra's,
// which name neither the argument nor the remedy.
func plainUsage(c *cobra.Command) {
	for _, sub := range c.Commands() {
		plainUsage(sub)
	}
	if c.HasSubCommands() || !c.Runnable() {
		return
	}
	check := c.Args
	if check == nil {
		check = cobra.NoArgs
	}
	c.Args = func(cmd *cobra.Command, args []string) error {
		if check(cmd, args) != nil {
			return argsError(cmd, args)
		}
		if err := missingFlag(cmd); err != nil {
			return err
		}
		return flagGroups(cmd)
	}
}

// argsError says which argument is missing or one too many, by the usage line of the command.
func argsError(cmd *cobra.Command, args []string) error {
	var words []string
	required := 0
	for _, w := range strings.Fields(cmd.Use)[1:] {
		if strings.HasPrefix(w, "-") {
			break // flags come last
		}
		words = append(words, w)
		if !strings.HasPrefix(w, "[") {
			required++
		}
	}
	line := strings.TrimSuffix(cmd.UseLine(), " [flags]")
	if len(args) < required {
		return fmt.Errorf("%s is missing: run %s", strings.NewReplacer("...", "", "|", " or ").Replace(words[len(args)]), line)
	}
	if len(args) <= len(words) {
		return fmt.Errorf("%q is not a valid argument: run %s", args[len(args)-1], line)
	}
	extra := args[len(words)]
	if f := cmd.Flags().ShorthandLookup("f"); len(words) == 0 && f != nil && !f.Changed {
		return fmt.Errorf("%q is not expected: give %s with -f %s", extra, whatFile(f), extra)
	}
	return fmt.Errorf("%q is not expected: run %s", extra, line)
}

// whatFile returns the name of what a file flag takes: the first words of its text.
func whatFile(f *pflag.Flag) string {
	_, usage := pflag.UnquoteUsage(f)
	what, _, _ := strings.Cut(usage, " as ")
	what, _, _ = strings.Cut(what, " (")
	return what
}

// missingFlag returns an error for the first required flag that was not used.
func missingFlag(cmd *cobra.Command) (err error) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if len(f.Annotations[cobra.BashCompOneRequiredFlag]) > 0 && !f.Changed && err == nil {
			_, usage := pflag.UnquoteUsage(f)
			err = fmt.Errorf("%s is missing: give %s", flagName(f), usage)
		}
	})
	return err
}

// flagName returns the shortest form of a flag.
func flagName(f *pflag.Flag) string {
	if f.Shorthand != "" {
		return "-" + f.Shorthand
	}
	return "--" + f.Name
}

// together matches cobra's error about flags that exclude each other.
var together = regexp.MustCompile(`\[([^\]]+)\] were all set`)

func flagGroups(cmd *cobra.Command) error {
	err := cmd.ValidateFlagGroups()
	if err == nil {
		return nil
	}
	if m := together.FindStringSubmatch(err.Error()); m != nil {
		return fmt.Errorf("--%s cannot be used together: give one of them", strings.ReplaceAll(m[1], " ", " and --"))
	}
	return err
}

// flagError returns the error of pflag about a flag in words.
func flagError(cmd *cobra.Command, err error) error {
	if e, ok := errors.AsType[*pflag.NotExistError](err); ok {
		name, dashes := e.GetSpecifiedName(), "--"
		if e.GetSpecifiedShortnames() != "" {
			return fmt.Errorf("-%s: there is no such flag", name)
		}
		var known []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { known = append(known, f.Name) })
		near := similar(name, known)
		for i := range near {
			near[i] = dashes + near[i]
		}
		return fmt.Errorf("--%s: there is no such flag%s", name, didYouMean(near))
	}
	if e, ok := errors.AsType[*pflag.ValueRequiredError](err); ok {
		_, usage := pflag.UnquoteUsage(e.GetFlag())
		return fmt.Errorf("%s has no value: give %s", flagName(e.GetFlag()), usage)
	}
	e, ok := errors.AsType[*pflag.InvalidValueError](err)
	if !ok {
		return err
	}
	f, value := e.GetFlag(), e.GetValue()
	text := fmt.Sprintf("%s %q: ", flagName(f), value)
	switch f.Value.Type() {
	case "duration":
		if _, err := time.ParseDuration(value + "s"); err == nil {
			return fmt.Errorf("%shas no unit: write %ss, or %sm for minutes", text, value, value)
		}
		return errors.New(text + "must be a duration, as 90s, 5m or 1h30m")
	case "uint64", "uint32":
		return errors.New(text + "must be a whole number of at least 0")
	case "bool":
		return errors.New(text + "must be true or false")
	}
	return errors.New(text + errors.Unwrap(e).Error())
}
