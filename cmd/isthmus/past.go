package main

import (
	"fmt"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// past has the flags of a command that lists what has happened: since when, and how much of it.
type past struct {
	flags *pflag.FlagSet
	since string
	limit int
	most  int // that a node shows
}

// flagsOf adds the flags for a list of things, such as "events".
func (p *past) flagsOf(f *pflag.FlagSet, things string, most int) {
	p.flags, p.most = f, most
	f.StringVar(&p.since, "since", "", "only "+things+" since this time: 1h ago as 1h, 11:20 of the last 24 hours, 2026-11-20 11:20:05 in local time, or RFC 3339")
	f.IntVar(&p.limit, "limit", 100, fmt.Sprintf("print at most the last so many %s, 1 to %d (default %d with --since, else 100)", things, most, most))
	f.Lookup("limit").DefValue = "0" // the text has it
}

// read returns the time of --since, nil without it, and checks the limit.
func (p *past) read(now time.Time) (since *timestamppb.Timestamp, err error) {
	if p.since != "" && !p.flags.Changed("limit") {
		p.limit = p.most
	}
	if p.limit < 1 || p.limit > p.most {
		return nil, usageError{fmt.Errorf("--limit %d: must be 1 to %d", p.limit, p.most)}
	}
	if p.since == "" {
		return nil, nil
	}
	t, err := parseMoment("--since", p.since, now)
	if err != nil {
		return nil, err
	}
	return timestamppb.New(t), nil
}
