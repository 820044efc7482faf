package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/event"
)

const (
	// enterprise is the number that RFC 5612 keeps for documentation: isthmus has none of its own.
	enterprise = "isthmus@32473"
	// facility is local0, which RFC 5424 leaves to the site.
	facility = 16
	// ackPace is how often the connection is asked whether the receiver has acknowledged all.
	ackPace = 10 * time.Millisecond
	// settleTime is how long the connection must last after that.
	settleTime = 500 * time.Millisecond
)

// severities are the numerical severities of RFC 5424, table 2.
var severities = map[event.Severity]int{event.Info: 6, event.Warning: 4, event.Error: 3}

// message returns an event in the format of RFC 5424.
func message(node, log string, gap bool, e event.Event) string {
	var b strings.Builder
	priority, ok := severities[e.Severity]
	if !ok {
		priority = severities[event.Warning]
	}
	fmt.Fprintf(&b, "<%d>1 %s %s isthmus - %s [%s", facility*8+priority, e.Time.UTC().Format("2006-01-02T15:04:05.000000Z"), header(node, 255), header(e.Type, 32), enterprise)
	param := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, ` %s="%s"`, name, escaped.Replace(printable(value)))
		}
	}
	param("log", log)
	param("sequence", strconv.FormatUint(e.Seq, 10))
	if gap {
		param("gap", "events before this one may be missing")
	}
	param("object", e.Object)
	param("detail", e.Detail)
	param("who", e.Who)
	if e.Generation > 0 {
		param("generation", strconv.FormatUint(e.Generation, 10))
	}
	if e.Lasted > 0 {
		param("lasted", e.Lasted.String())
	}
	b.WriteString("] ")
	text := printable(e.Message)
	if strings.ContainsFunc(text, func(r rune) bool { return r > unicode.MaxASCII }) {
		b.WriteString("\ufeff") // MSG-UTF8
	}
	b.WriteString(text)
	return b.String()
}

// escaped escapes a PARAM-VALUE (RFC 5424 section 6.3.3).
var escaped = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `]`, `\]`)

// printable replaces control characters: texts are also from peers, and a line end would begin
// another record at some receivers.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// header returns a text as a field of the header: printable ASCII without blanks.
func header(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s[:min(len(s), most)]
}

type syslogSender struct {
	target Target
	node   string
	dial   *net.Dialer
	conn   net.Conn
	closed chan struct{} // by the receiver
}

func newSyslog(t Target, node string, reach func(netip.Addr) error) *syslogSender {
	return &syslogSender{target: t, node: node, dial: dialer(reach)}
}

func (s *syslogSender) close() {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

func (s *syslogSender) open(ctx context.Context) error {
	if s.conn != nil {
		select {
		case <-s.closed: // since the last batch
			s.close()
		default:
			return nil
		}
	}
	network := "tcp"
	if s.target.UDP {
		network = "udp"
	}
	conn, err := s.dial.DialContext(ctx, network, s.target.Syslog.String())
	if err != nil {
		return err
	}
	s.conn, s.closed = conn, make(chan struct{})
	if !s.target.UDP {
		// A receiver has nothing to say: the end of the connection is all that can be read.
		go func(closed chan struct{}) {
			defer close(closed)
			_, _ = io.Copy(io.Discard, conn)
		}(s.closed)
	}
	return nil
}

func (s *syslogSender) send(ctx context.Context, log string, gap bool, events []event.Event) error {
	ctx, cancel := context.WithTimeout(ctx, sendTime)
	defer cancel()
	err := s.open(ctx)
	if err == nil {
		conn := s.conn
		_ = conn.SetWriteDeadline(time.Time{})
		stop := context.AfterFunc(ctx, func() { _ = conn.SetWriteDeadline(time.Unix(1, 0)) })
		err = s.write(ctx, log, gap, events)
		stop()
	}
	if err != nil {
		s.close()
		return fmt.Errorf("sending to %s: %w", s.target, err)
	}
	return nil
}

func (s *syslogSender) write(ctx context.Context, log string, gap bool, events []event.Event) error {
	var stream []byte
	for i, e := range events {
		m := message(s.node, log, gap && i == 0, e)
		if s.target.UDP {
			// The port of a receiver that does not listen answers with ICMP, which is the error of a
			// later write.
			if _, err := s.conn.Write([]byte(m)); err != nil {
				return err
			}
			continue
		}
		stream = fmt.Appendf(stream, "%d %s", len(m), m) // octet counting, RFC 6587
	}
	if s.target.UDP {
		return nil
	}
	if _, err := s.conn.Write(stream); err != nil {
		return err
	}
	return s.acknowledged(ctx)
}

// acknowledged waits until the receiver's TCP has acknowledged all, and some time for the end of the
// connection, with which a program that has gone refuses what it did not read: syslog has no
// acknowledgement of its own.
func (s *syslogSender) acknowledged(ctx context.Context) error {
	raw, err := s.conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	pause := ackPace
	for {
		select {
		case <-time.After(pause):
		case <-s.closed:
			return errors.New("the receiver has closed the connection, and may have taken some of the events")
		case <-ctx.Done():
			return errors.New("the receiver does not take the events")
		}
		if pause == settleTime {
			return nil
		}
		var left int
		var ioctlErr error
		err := raw.Control(func(fd uintptr) { left, ioctlErr = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if err := errors.Join(err, ioctlErr); err != nil {
			return err
		}
		if left == 0 {
			pause = settleTime
		}
	}
}
