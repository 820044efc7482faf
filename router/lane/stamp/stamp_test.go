package stamp

import (
	"bytes"
	"encoding/hex"
	"reflect"
	"strings"
	"testing"
	"time"
)

var (
	sender    = Stamp{Sequence: 7, Time: 0x0102030405060708, Error: errorEstimate, Session: 0xabcd}
	reflector = Stamp{Sequence: 9, Time: 0x1112131415161718, Error: errorEstimate, Session: 0xabcd}
	told      = Report{ID: 0x2122232425262728, Lanes: []LaneReport{{Lane: 1, Heard: Hears, Loss: 3}, {Lane: 2, Heard: Silence, Loss: 1000, PathMTU: 1280}}}
)

// TestLayout compares packets with the figures of RFC 8762 and RFC 8972, byte for byte.
func TestLayout(t *testing.T) {
	plain := "00000007" + "0102030405060708" + "0001" + "abcd"
	answer := "00000009" + "1112131415161718" + "0001" + "abcd" + "3132333435363738" + "00000007" + "0102030405060708" + "0001" + "0000" + "ff" + "000000"
	tlv := "f0" + "001c" + "01020000" + "2122232425262728" + "0101000300000000" + "020203e805000000"
	reply := Packet{Stamp: reflector, Received: 0x3132333435363738, Sender: Stamp{Sequence: 7, Time: sender.Time, Error: errorEstimate}, TTL: 255}
	with := reply
	with.Report, with.Reply = &told, true
	for name, k := range map[string]struct {
		packet Packet
		bytes  []byte
		want   string
	}{
		"sender":                       {Packet{Stamp: sender}, AppendRequest(nil, &Packet{Stamp: sender}, 0), plain + strings.Repeat("00", 28)},
		"sender with a report":         {Packet{Stamp: sender, Report: &told}, AppendRequest(nil, &Packet{Stamp: sender, Report: &told}, 0), plain + strings.Repeat("00", 28) + "80" + tlv},
		"sender, padded":               {Packet{Stamp: sender}, AppendRequest(nil, &Packet{Stamp: sender}, 50), plain + strings.Repeat("00", 28) + "80010002" + "0000"},
		"reflector":                    {reply, AppendReply(nil, &reply, 0), answer},
		"reflector of a larger packet": {reply, AppendReply(nil, &reply, 47), answer + "000000"},
		"reflector with a report":      {with, AppendReply(nil, &with, 0), answer + "00" + tlv},
	} {
		if got := hex.EncodeToString(k.bytes); got != k.want {
			t.Errorf("%s:\n%s, want\n%s", name, got, k.want)
		}
		if got, err := Parse(k.bytes); err != nil || !reflect.DeepEqual(got, k.packet) {
			t.Errorf("%s: parsed %+v, %v, want %+v", name, got, err, k.packet)
		}
	}
	if n := len(AppendRequest(nil, &Packet{Stamp: sender, Report: &told}, 1392)); n != 1392 {
		t.Errorf("a padded packet has %d bytes", n)
	}
}

// TestRefused parses packets that no reflector or sender sends.
func TestRefused(t *testing.T) {
	base := AppendRequest(nil, &Packet{Stamp: sender}, 0)
	good := AppendRequest(nil, &Packet{Stamp: sender, Report: &told}, 0)
	change := func(at int, to byte) []byte {
		b := bytes.Clone(good)
		b[at] = to
		return b
	}
	for name, k := range map[string]struct {
		b    []byte
		want error
	}{
		"short":              {base[:43], errShort},
		"a long TLV":         {append(bytes.Clone(base), 0x80, 1, 0, 1), errTLV},
		"many TLVs":          {append(bytes.Clone(base), bytes.Repeat([]byte{0x80, 1, 0, 0}, 17)...), errTLVs},
		"another version":    {change(48, 2), errReport},
		"more lanes":         {change(49, 3), errReport},
		"fewer lanes":        {change(49, 1), errReport},
		"an unknown state":   {change(61, 3), errReport},
		"more than all lost": {change(62, 0xff), errReport},
	} {
		if _, err := Parse(k.b); err != k.want {
			t.Errorf("%s: %v, want %v", name, err, k.want)
		}
	}
	if p, err := Parse(append(bytes.Clone(base), 0, 0, 0, 9, 9)); err != nil || p.Report != nil {
		t.Errorf("padding without a TLV: %v", err)
	}
	many := told
	many.Lanes = make([]LaneReport, 40)
	if p, err := Parse(AppendRequest(nil, &Packet{Report: &many}, 0)); err != nil || len(p.Report.Lanes) != MaxLanes {
		t.Errorf("a report of 40 lanes: %+v, %v", p.Report, err)
	}
}

// TestTime checks the format of NTP, and differences over the end of its era.
func TestTime(t *testing.T) {
	if got := Time(time.Unix(0, 500_000_000)); got != epoch<<32|1<<31 {
		t.Errorf("%x", got)
	}
	end := time.Unix(1<<32-epoch, 0)
	for _, d := range []time.Duration{0, time.Nanosecond, 1500 * time.Millisecond, -300 * time.Millisecond, time.Hour} {
		if got := Between(Time(end.Add(-100*time.Millisecond)), Time(end.Add(d-100*time.Millisecond))); (got - d).Abs() > time.Nanosecond {
			t.Errorf("%v, want %v", got, d)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(AppendRequest(nil, &Packet{Stamp: sender, Report: &told}, 200))
	f.Add(AppendReply(nil, &Packet{Stamp: reflector, Report: &told}, 60))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			return
		}
		p.Error = errorEstimate
		if !p.Reply {
			p.Received, p.Sender, p.TTL = 0, Stamp{}, 0
		}
		again := AppendRequest(nil, &p, 0)
		if p.Reply {
			again = AppendReply(nil, &p, 0)
		}
		if q, err := Parse(again); err != nil || !reflect.DeepEqual(p, q) {
			t.Errorf("%+v became %+v, %v", p, q, err)
		}
	})
}
