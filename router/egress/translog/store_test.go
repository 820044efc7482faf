package translog

import (
	"cmp"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/test/root"
)

var epoch = time.Date(2026, 11, 20, 0, 0, 0, 0, time.UTC)

// traffic makes the records of a fictional site: 2,000 sources behind four addresses, four out of
// five flows to popular destinations, most of them short TCP connections whose time in TIME_WAIT
// counts too.
type traffic struct{ *rand.Rand }

func newTraffic(seed uint64) traffic { return traffic{rand.New(rand.NewPCG(seed, 1))} }

func (r traffic) record(end time.Time) Record {
	in := r.IntN(2000)
	rec := Record{End: end.Truncate(time.Millisecond), Protocol: 6, Policy: "partners"}
	life := time.Duration(r.ExpFloat64() * float64(3*time.Second))
	linger := 120 * time.Second // nf_conntrack_tcp_timeout_time_wait
	if r.IntN(4) == 0 {
		rec.Protocol, linger, rec.Policy = 17, 30*time.Second, "dns"
		life /= 50
	}
	if r.IntN(50) == 0 {
		life = time.Duration(r.ExpFloat64() * float64(40*time.Minute))
	}
	// The kernel's garbage collector removes expired entries up to a few seconds late.
	rec.Start = rec.End.Add(-life - linger - time.Duration(r.Float64()*float64(2*time.Second))).Truncate(time.Millisecond)
	var dst [4]byte
	port := uint16(443)
	if r.IntN(5) > 0 { // popular: a heavy head
		n := int(math.Pow(200, r.Float64())) - 1
		dst = [4]byte{198, 51, byte(n >> 8), byte(n)}
		if rec.Protocol == 17 {
			port = 53
		}
	} else {
		n := r.IntN(60000)
		dst, port = [4]byte{203, byte(n >> 14), byte(n >> 6), byte(n)}, []uint16{443, 443, 443, 80, 8443}[r.IntN(5)]
	}
	inside := netip.AddrFrom4([4]byte{10, 1, byte(in >> 8), byte(in)})
	from := uint16(32768 + r.IntN(28232))
	out := from
	if r.IntN(20) == 0 {
		out = uint16(1024 + r.IntN(64512))
	}
	rec.Inside = netip.AddrPortFrom(inside, from)
	rec.Outside = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(8 + in%4)}), out)
	rec.Destination = netip.AddrPortFrom(netip.AddrFrom4(dst), port)
	packets := uint64(r.ExpFloat64()*8) + 5
	if rec.Protocol == 17 {
		packets = 1
		rec.Sent = nat.Counter{Packets: 1, Bytes: 60 + uint64(r.IntN(30))}
		rec.Received = nat.Counter{Packets: 1, Bytes: 80 + uint64(r.IntN(200))}
	} else {
		rec.Sent = nat.Counter{Packets: packets, Bytes: packets*52 + 300 + uint64(r.ExpFloat64()*700)}
		rec.Received = nat.Counter{Packets: packets + uint64(r.IntN(5)), Bytes: packets*400 + uint64(r.ExpFloat64()*4000)}
	}
	return rec
}

func (r Record) answers(q Query) bool {
	return (r.Outside == q.Outside || q.AnyPort && r.Outside.Addr() == q.Outside.Addr()) && !r.End.Before(q.From) && !r.Start.After(q.To) && (q.Protocol == 0 || q.Protocol == r.Protocol) &&
		(!q.Destination.IsValid() || r.Destination.Addr() == q.Destination)
}

func sorted(list []Record) []Record {
	slices.SortFunc(list, func(a, b Record) int {
		return cmp.Or(a.Start.Compare(b.Start), a.End.Compare(b.End), a.Inside.Compare(b.Inside), a.Destination.Compare(b.Destination))
	})
	return list
}

func open(t testing.TB, dir string, c egress.Log) *Store {
	t.Helper()
	s, err := OpenStore(dir, c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var unbounded = egress.Log{Enabled: true, MaxAge: math.MaxInt64, MaxBytes: math.MaxInt64}

// same compares with the expected records, where times have no monotonic part or zone.
func same(a, b []Record) bool {
	return slices.EqualFunc(sorted(a), sorted(b), func(a, b Record) bool {
		a.Start, a.End, b.Start, b.End = a.Start.UTC(), a.End.UTC(), b.Start.UTC(), b.End.UTC()
		return a == b
	})
}

// TestFindAgreesWithModel sends the same queries to a store and a plain list, across runs,
// journals, memory and restarts.
func TestFindAgreesWithModel(t *testing.T) {
	r := newTraffic(1)
	dir := t.TempDir()
	s := open(t, dir, unbounded)
	var all []Record
	now := epoch
	check := func(what string) {
		t.Helper()
		answers := 0
		for range root.Count(150, 30) {
			p := all[r.IntN(len(all))]
			at := p.Start.Add(time.Duration(r.Float64() * 1.2 * float64(p.End.Sub(p.Start))))
			if p.Start.IsZero() {
				at = p.End.Add(-time.Hour)
			}
			at = at.Truncate(time.Millisecond)
			q := Query{Outside: p.Outside, From: at, To: at.Add(time.Second)}
			switch r.IntN(6) {
			case 5:
				q.AnyPort, q.Destination, q.Outside = true, p.Destination.Addr(), netip.AddrPortFrom(q.Outside.Addr(), 0)
			case 0:
				q.Protocol = 17
			case 1:
				q.Destination = p.Destination.Addr()
			case 2:
				q.Outside = netip.AddrPortFrom(q.Outside.Addr(), q.Outside.Port()^1)
			}
			var want []Record
			for _, rec := range all {
				if rec.answers(q) {
					want = append(want, rec)
				}
			}
			got, err := s.Find(t.Context(), q)
			if err != nil || !same(got, want) {
				t.Fatalf("%s: %+v: %d answers, want %d; %v", what, q, len(got), len(want), err)
			}
			answers += len(want)
			q.Limit = max(1, len(want)/2)
			if got, err := s.Find(t.Context(), q); err != nil || len(got) != min(q.Limit, len(want)) {
				t.Fatalf("%s: %+v: %d answers, want %d; %v", what, q, len(got), min(q.Limit, len(want)), err)
			}
		}
		if answers < root.Count(50, 10) {
			t.Errorf("%s: only %d answers", what, answers)
		}
	}
	for round := range 4 {
		for i := range 9000 {
			now = now.Add(10 * time.Millisecond)
			rec := r.record(now)
			switch i % 500 {
			case 0: // many records with one address and port fill more than a page
				rec.Outside = netip.MustParseAddrPort("192.0.2.9:500")
			case 1:
				rec.Start = time.Time{}
			case 2:
				rec.Vanished = true
			case 3:
				rec.Inside, rec.Outside, rec.Destination = netip.MustParseAddrPort("[2001:db8::5]:99"), netip.MustParseAddrPort("[2001:db8:ff::1]:77"), netip.MustParseAddrPort("[2001:db8:1::1]:443")
			case 4:
				rec.Sent = nat.Counter{Packets: math.MaxUint64, Bytes: math.MaxUint64}
				rec.Policy = fmt.Sprint("p", r.IntN(3))
			}
			if i < 8500 && round == 1 {
				rec.Outside = netip.MustParseAddrPort("192.0.2.9:500")
				rec.Start = rec.End.Add(-time.Second)
			}
			s.Append(rec, now)
			all = append(all, rec)
			if i%1000 == 0 {
				if err := s.Sync(now); err != nil {
					t.Fatal(err)
				}
			}
		}
		check("in memory and journals")
		if round%2 == 0 {
			now = now.Add(2 * runAge) // makes runs of everything
		}
		if err := s.Sync(now); err != nil {
			t.Fatal(err)
		}
		check("synced")
		s.Close()
		s = open(t, dir, unbounded)
		if len(s.Notes()) > 0 {
			t.Error(s.Notes())
		}
		check("after a restart")
	}
	s.Close()
}

// TestClockGoesBack has the clock set back while a flow lives: the flow is found at its begin and
// at its end, by either time, from memory and from a run, also after a restart.
func TestClockGoesBack(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, unbounded)
	rec := newTraffic(7).record(epoch)
	rec.Start, rec.End = epoch, epoch.Add(-time.Hour)
	other := rec
	other.Start, other.End, other.Outside = epoch.Add(-3*time.Hour), epoch.Add(-2*time.Hour), netip.AddrPortFrom(rec.Outside.Addr(), rec.Outside.Port()+1)
	check := func(what string) {
		t.Helper()
		for _, at := range []time.Time{rec.Start, rec.End} {
			found, err := s.Find(t.Context(), Query{Outside: rec.Outside, From: at.Add(-time.Second), To: at.Add(time.Second)})
			if err != nil || !same(found, []Record{rec}) {
				t.Errorf("%s, at %v: %+v, %v", what, at, found, err)
			}
		}
		for _, at := range []time.Time{rec.Start.Add(2 * time.Second), rec.End.Add(-2 * time.Second)} {
			if found, err := s.Find(t.Context(), Query{Outside: rec.Outside, From: at, To: at}); err != nil || len(found) > 0 {
				t.Errorf("%s, at %v: %+v, %v", what, at, found, err)
			}
		}
	}
	s.Append(other, epoch)
	s.Append(rec, epoch)
	check("in memory")
	if err := s.Sync(epoch); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, dir, unbounded)
	check("from the journal")
	if err := s.Sync(epoch.Add(2 * runAge)); err != nil {
		t.Fatal(err)
	}
	check("in a run")
	s.Close()
	s = open(t, dir, unbounded)
	defer func() { s.Close() }()
	check("after a new start")
}

// TestTornTail cuts the newest journal and the newest file of runs where a power loss may cut them:
// earlier data is there, and the cut is in Notes.
func TestTornTail(t *testing.T) {
	r := newTraffic(2)
	dir := t.TempDir()
	s := open(t, dir, unbounded)
	const each = 300
	for i := range 3 { // three syncs, each one run in the journal
		for range each {
			rec := r.record(epoch)
			rec.Start = epoch.Add(-time.Minute)
			rec.Outside = netip.MustParseAddrPort("192.0.2.9:500")
			s.Append(rec, epoch)
		}
		now := epoch
		if i == 0 {
			now = epoch.Add(2 * runAge)
		}
		if err := s.Sync(now); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	q := Query{Outside: netip.MustParseAddrPort("192.0.2.9:500"), From: epoch, To: epoch}
	for _, kind := range []string{"*.journal", "*.flows"} {
		names, _ := filepath.Glob(filepath.Join(dir, "short", kind))
		if len(names) != 1 {
			t.Fatal(names)
		}
		whole, err := os.ReadFile(names[0])
		if err != nil {
			t.Fatal(err)
		}
		h, err := decodeHeader(whole)
		if err != nil {
			t.Fatal(err)
		}
		for cut := 1; cut < len(whole); cut += 1 + len(whole)/60 {
			if err := os.WriteFile(names[0], whole[:cut], 0o600); err != nil {
				t.Fatal(err)
			}
			s := open(t, dir, unbounded)
			found, err := s.Find(t.Context(), q)
			s.Close()
			want := each
			if kind == "*.flows" {
				want = 2 * each // those of the journal; the only run is cut
			} else if cut >= int(h.size) {
				want = 2 * each
			}
			if err != nil || len(found) != want || cut != int(h.size) && len(s.Notes()) != 1 {
				t.Fatalf("%s cut at %d of %d: %d records, want %d; %v; notes %v", kind, cut, len(whole), len(found), want, err, s.Notes())
			}
		}
		if err := os.WriteFile(names[0], whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	// A page that the disk has changed is reported and skipped.
	names, _ := filepath.Glob(filepath.Join(dir, "short", "*.flows"))
	b, _ := os.ReadFile(names[0])
	b[len(b)-10] ^= 1
	if err := os.WriteFile(names[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, unbounded)
	defer s.Close()
	if found, err := s.Find(t.Context(), q); !errors.Is(err, errDamaged) || len(found) != 2*each {
		t.Errorf("%d records, %v", len(found), err)
	}
}

// TestCrashBetween has a crash between writing a run and deleting its journal: no row comes twice.
func TestCrashBetween(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, unbounded)
	rec := newTraffic(3).record(epoch)
	s.Append(rec, epoch)
	if err := s.Sync(epoch); err != nil {
		t.Fatal(err)
	}
	journal := filepath.Join(dir, "short", "0000000001.journal")
	b, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Sync(epoch.Add(2 * runAge)); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := os.Stat(journal); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the journal is still there: %v", err)
	}
	if err := os.WriteFile(journal, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, unbounded)
	defer s.Close()
	if found, err := s.Find(t.Context(), Query{Outside: rec.Outside, From: rec.End, To: rec.End}); err != nil || len(found) != 1 {
		t.Errorf("%d records, %v", len(found), err)
	}
}

func TestBounds(t *testing.T) {
	r := newTraffic(4)
	dir := t.TempDir()
	s := open(t, dir, unbounded)
	defer s.Close()
	var firsts []Record
	now := epoch
	for range 5 {
		for i := range 2000 {
			rec := r.record(now)
			if rec.Start = rec.End.Add(-time.Minute); i == 0 {
				firsts = append(firsts, rec)
			}
			s.Append(rec, now)
		}
		now = now.Add(2 * fileAge)
		if err := s.Sync(now); err != nil {
			t.Fatal(err)
		}
	}
	has := func(want ...bool) {
		t.Helper()
		for i, rec := range firsts {
			if found, err := s.Find(t.Context(), Query{Outside: rec.Outside, From: rec.End, To: rec.End}); err != nil || len(found) > 0 != want[i] {
				t.Errorf("record of day %d: %v %v", 2*i, found, err)
			}
		}
	}
	has(true, true, true, true, true)
	_, size := s.Size()
	s.Limit(egress.Log{MaxAge: math.MaxInt64, MaxBytes: size * 7 / 10})
	if err := s.Sync(now); err != nil {
		t.Fatal(err)
	}
	has(false, false, true, true, true)
	if records, after := s.Size(); records != 6000 || after > size*7/10 {
		t.Errorf("%d records, %d bytes", records, after)
	}
	s.Limit(egress.Log{MaxAge: 3 * fileAge, MaxBytes: math.MaxInt64})
	if err := s.Sync(now); err != nil {
		t.Fatal(err)
	}
	has(false, false, false, false, true)
	if files, _ := filepath.Glob(filepath.Join(dir, "*", "*")); len(files) != 1 {
		t.Errorf("left on disk: %v", files)
	}
}

// TestDiskFails removes the directory: nothing is lost while there is room in memory, then lost
// records are counted, and once the disk is back all pending records are written.
func TestDiskFails(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, unbounded)
	defer s.Close()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	rec := newTraffic(5).record(epoch)
	rec.Start = rec.End
	n := 0
	for n = range 2*waitingRows + 10 {
		s.Append(rec, epoch)
		if n == 10 || n == waitingRows-1 {
			if err := s.Sync(epoch); !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	if s.Lost() != 10+1 {
		t.Logf("lost %d", s.Lost())
	}
	if lost := s.Lost(); lost == 0 || lost > 11 {
		t.Errorf("lost %d", lost)
	}
	if err := os.MkdirAll(filepath.Join(dir, "short"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Sync(epoch); err != nil {
			t.Fatal(err)
		}
	}
	if records, _ := s.Size(); records+s.Lost() != uint64(n)+1 {
		t.Errorf("%d records and %d lost of %d", records, s.Lost(), n+1)
	}
}

func FuzzDecodeRun(f *testing.F) {
	b := &batch{}
	r := newTraffic(6)
	for range 20 {
		b.add(r.record(epoch))
	}
	f.Add(newEncoder(flate.HuffmanOnly).encode(b.names(), b.rows, 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		n, rows, err := decodeRun(data)
		if err == nil {
			for _, w := range rows {
				_ = n.record(w)
			}
		}
		// Without checksums, which random bytes do not pass.
		x := index{names: names{}}
		_, _ = x.decodePage(pageAt{}, part(nil, data))
		_, _ = decodeIndex(header{}, part(nil, data))
		_ = (&index{inside: 9, destinations: 9, policies: 9}).decodeNames(part(nil, data))
	})
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRun makes a run of 52 seconds of 5,000 flows each, and journals of one second.
func BenchmarkRun(b *testing.B) {
	r := newTraffic(8)
	var all batch
	for i := range runRows {
		rec := r.record(epoch.Add(time.Duration(i) * time.Second / 5000))
		for rec.End.Sub(rec.Start) > longFlow {
			rec = r.record(rec.End)
		}
		all.add(rec)
	}
	runs, journals := newEncoder(flate.HuffmanOnly), newEncoder(flate.NoCompression)
	for b.Loop() {
		start := cpu()
		run := runs.encode(all.names(), all.rows, 1)
		b.ReportMetric(float64(len(run))/runRows, "bytes/record")
		b.ReportMetric((cpu()-start).Seconds()*1e6/runRows, "cpu-us/record")
		start = cpu()
		var size int
		for second := range slices.Chunk(all.rows, 5000) {
			size += len(journals.encode(all.names(), second, 1))
		}
		b.ReportMetric(float64(size)/runRows, "journal-bytes/record")
		b.ReportMetric((cpu()-start).Seconds()*1e6/runRows, "journal-cpu-us/record")
	}
}

// BenchmarkDay is a day of 5,000 flows a second, as far as a query sees it: all long flows of the
// day, and the short ones of half an hour around the moment of the query. Everything is on disk.
func BenchmarkDay(b *testing.B) {
	const perSecond = 5000
	for b.Loop() {
		dir := b.TempDir()
		s := open(b, dir, unbounded)
		r := newTraffic(7)
		noon := epoch.Add(12 * time.Hour)
		var asked []Record
		var n, long int
		begun := cpu()
		for now := epoch; now.Before(epoch.Add(24 * time.Hour)); now = now.Add(time.Second) {
			near := now.Sub(noon).Abs() < 15*time.Minute
			count := perSecond
			if !near {
				count = perSecond / 50 // one in fifty is drawn from the longer distribution
			}
			for i := range count {
				rec := r.record(now.Add(time.Duration(i) * time.Second / time.Duration(count)))
				if !near {
					for rec.End.Sub(rec.Start) <= longFlow {
						rec.Start = rec.End.Add(-time.Duration(r.ExpFloat64() * float64(40*time.Minute))).Truncate(time.Millisecond)
					}
				}
				if rec.End.Sub(rec.Start) > longFlow {
					long++
				}
				if now.Equal(noon) && len(asked) < 40 {
					asked = append(asked, rec)
				}
				s.Append(rec, now)
				n++
			}
			if near || now.Second() == 0 { // elsewhere a minute has as many flows as a second here
				if err := s.Sync(now); err != nil {
					b.Fatal(err)
				}
			}
		}
		writing := cpu() - begun
		s.Close()
		start := time.Now()
		s = open(b, dir, unbounded)
		opening := time.Since(start)
		runtime.GC()
		var worst, total time.Duration
		for _, rec := range asked {
			start := time.Now()
			found, err := s.Find(context.Background(), Query{Outside: rec.Outside, From: rec.End, To: rec.End})
			took := time.Since(start)
			if err != nil || !slices.ContainsFunc(found, func(f Record) bool { return f.Inside == rec.Inside }) {
				b.Fatal(found, err)
			}
			worst, total = max(worst, took), total+took
		}
		records, size := s.Size()
		s.Close()
		b.ReportMetric(float64(size)/float64(records), "bytes/record")
		b.ReportMetric(float64(n), "records")
		b.ReportMetric(float64(long), "long")
		b.ReportMetric(worst.Seconds()*1000, "worst-ms")
		b.ReportMetric(total.Seconds()*1000/float64(len(asked)), "mean-ms")
		b.ReportMetric(writing.Seconds()*1e6/float64(n), "cpu-us/record")
		b.ReportMetric(opening.Seconds()*1000, "open-ms")
	}
}
