package gobgp

import (
	"net/netip"
	"regexp"
	"strings"
)

// crash describes how the BGP process ended.
type crash struct {
	// peer is the address of the peer whose message was being processed; invalid when unknown.
	peer   netip.Addr
	reason string
}

var (
	panicLine   = regexp.MustCompile(`(?m)^(?:panic|fatal error|runtime error): .*$`)
	runningLine = regexp.MustCompile(`(?m)^goroutine \d+ .*\[running.*:$`)
	labelPair   = regexp.MustCompile(`"` + peerLabel + `": "([^"\\]*)"`)
)

// decodeCrash reads the output of a Go program that panics: the reason, and the goroutine with its
// labels. A goroutine that sends does not incriminate its peer, because it encodes what other
// peers sent.
func decodeCrash(stderr, status string) crash {
	c := crash{reason: status}
	if line := panicLine.FindString(stderr); line != "" {
		c.reason = line[:min(len(line), 300)]
	} else if line, _, _ := strings.Cut(strings.TrimSpace(stderr), "\n"); line != "" {
		c.reason = status + ": " + line[:min(len(line), 300)]
	}
	at := runningLine.FindStringIndex(stderr)
	if at == nil {
		return c
	}
	stack, _, _ := strings.Cut(stderr[at[1]:], "\n\n")
	label := labelPair.FindStringSubmatch(stderr[at[0]:at[1]])
	if label == nil || strings.Contains(stack, ").sendMessageloop") {
		return c
	}
	if a, err := netip.ParseAddr(label[1]); err == nil {
		c.peer = a
	}
	return c
}
