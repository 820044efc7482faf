package helper

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
)

// computer is a disk, and what the helper has done with the machine.
type computer struct {
	t    *testing.T
	dir  string
	disk slot.Disk
	keys slot.Keys
	tpm  TPM

	mu      sync.Mutex
	done    []string
	busy    int // number of requests that the machine refuses first
	settled int
}

const slotSize = 1 << 20

func newComputer(t *testing.T) *computer {
	t.Helper()
	c := &computer{t: t, dir: t.TempDir()}
	c.disk = slot.Disk{Dir: filepath.Join(c.dir, "disk")}
	if err := os.Mkdir(c.disk.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for label, size := range map[string]int64{"slot-a": 2 << 20, "slot-b": 2 << 20, "env": 2 << 20} {
		path := filepath.Join(c.disk.Dir, label)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
	}
	public, private, err := slot.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(c.dir, "key"), private, 0o600), os.WriteFile(filepath.Join(c.dir, "key.pub"), public, 0o600)); err != nil {
		t.Fatal(err)
	}
	if c.keys, err = slot.ReadKeys(c.dir); err != nil {
		t.Fatal(err)
	}
	if err := c.disk.Format(); err != nil {
		t.Fatal(err)
	}
	data, text := c.release("1.0", 10)
	sig, err := slot.ParseSignature([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.disk.Write(context.Background(), slot.A, bytes.NewReader(data), int64(len(data)), sig, c.keys); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *computer) env(e slot.Env) {
	c.t.Helper()
	if err := c.disk.SetEnv(e); err != nil {
		c.t.Fatal(err)
	}
}

func (c *computer) release(version string, serial int64) ([]byte, string) {
	c.t.Helper()
	data := bytes.Repeat([]byte(version), slotSize/len(version))
	path := filepath.Join(c.dir, "slot-"+version)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		c.t.Fatal(err)
	}
	text, err := slot.Sign(filepath.Join(c.dir, "key"), "", path, slot.Release{Version: version, Serial: serial})
	if err != nil {
		c.t.Fatal(err)
	}
	return data, string(text)
}

// boot starts the helper as after the loader has started the machine.
func (c *computer) boot(running slot.Name, limit time.Duration) (Client, func()) {
	c.t.Helper()
	socket := filepath.Join(c.dir, "socket")
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := New(Options{
		Disk: c.disk, Keys: c.keys, Running: running, TPM: c.tpm, Limit: limit, Log: slog.New(slog.DiscardHandler),
		Machine: func(verb string) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.busy > 0 {
				c.busy--
				return errors.New("systemd is busy")
			}
			c.done = append(c.done, verb)
			return nil
		},
		TrialEnded: func() { c.mu.Lock(); defer c.mu.Unlock(); c.settled++ },
	})
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				c.t.Error(err)
			}
		})
	}
	c.t.Cleanup(stop)
	return Client{Socket: socket}, stop
}

func (c *computer) did() (string, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.done, " "), c.settled
}

func (c *computer) want(want slot.Env) {
	c.t.Helper()
	if e, err := c.disk.Env(); err != nil || e != want {
		c.t.Errorf("the loader's block is %+v, %v; want %+v", e, err, want)
	}
}

// invalid checks a refusal that is the caller's fault.
func (c *computer) invalid(err error, text string) {
	c.t.Helper()
	c.refuses(err, text)
	if !errors.Is(err, ErrInvalid) {
		c.t.Errorf("%v is not the caller's fault", err)
	}
}

func (c *computer) refuses(err error, text string) {
	c.t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		c.t.Errorf("error %v, want %q", err, text)
	}
}

// TestUpgrade checks a successful upgrade: written, tried, marked good; the former slot stays as it
// was.
func TestUpgrade(t *testing.T) {
	ctx := context.Background()
	c := newComputer(t)
	h, stop := c.boot(slot.A, 0)
	data, sig := c.release("1.1", 11)
	if err := h.Write(ctx, int64(len(data)), sig, false, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	c.want(slot.Env{Good: slot.A})
	if err := h.Do(ctx, DoTry); err != nil {
		t.Fatal(err)
	}
	c.want(slot.Env{Good: slot.A, Trial: slot.B, Tries: 3})
	c.refuses(h.Do(ctx, DoGood), "not on trial")
	if err := h.Do(ctx, DoReboot); err != nil {
		t.Fatal(err)
	}
	stop()
	c.env(slot.Env{Good: slot.A, Trial: slot.B, Tries: 2}) // the loader
	h, _ = c.boot(slot.B, time.Hour)
	st, err := h.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.Running != slot.B || st.Slots[slot.B].Version != "1.1" || st.Slots[slot.A].Version != "1.0" || st.Deadline.IsZero() || st.Slots[slot.B].KeyID != st.Keys[0] {
		t.Errorf("status %+v", st)
	}
	c.refuses(h.Write(ctx, int64(len(data)), sig, false, bytes.NewReader(data)), "not marked good yet")
	c.refuses(h.Do(ctx, DoTry), "on trial itself")
	if did, settled := c.did(); did != "reboot" || settled != 1 { // once at the first boot
		t.Errorf("did %q, settled %d", did, settled)
	}
	if err := h.Do(ctx, DoGood); err != nil {
		t.Fatal(err)
	}
	c.want(slot.Env{Good: slot.B})
	if _, settled := c.did(); settled != 2 {
		t.Errorf("settled %d times", settled)
	}
}

func TestRefuses(t *testing.T) {
	ctx := context.Background()
	c := newComputer(t)
	h, _ := c.boot(slot.A, 0)
	c.refuses(h.Do(ctx, DoTry), "slot is empty")
	c.refuses(h.Do(ctx, DoReject), "not on trial")
	c.refuses(h.Do(ctx, "format"), "not a request")
	data, sig := c.release("0.9", 9)
	c.refuses(h.Write(ctx, int64(len(data)), sig, false, bytes.NewReader(data)), "version 0.9 (serial 9), and version 1.0 (serial 10) runs")
	if err := h.Write(ctx, int64(len(data)), sig, true, bytes.NewReader(data)); err != nil {
		t.Errorf("an older slot on request: %v", err)
	}
	c.invalid(h.Write(ctx, int64(len(data)), "untrusted comment: x\n", true, bytes.NewReader(data)), "reading the signature")
	c.invalid(h.Write(ctx, 64<<20, sig, true, io.LimitReader(zeros{}, 64<<20)), "at most 2097152")
	// The slot keeps its former content, because the helper refuses before it writes.
	if err := h.Do(ctx, DoTry); err != nil {
		t.Error(err)
	}
	data[len(data)-1] ^= 1
	c.invalid(h.Write(ctx, int64(len(data)), sig, true, bytes.NewReader(data)), "does not belong to this slot")
	c.want(slot.Env{Good: slot.A})
	c.refuses(h.Do(ctx, DoTry), "slot is empty")
	if _, err := (Client{Socket: filepath.Join(c.dir, "none")}).Status(ctx); !errors.Is(err, slot.ErrNoSlots) {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestDeadline checks that a trial that is not marked good is given up, also when systemd refuses
// the reboot at first.
func TestDeadline(t *testing.T) {
	c := newComputer(t)
	c.busy = 1
	c.env(slot.Env{Good: slot.B, Trial: slot.A, Tries: 1})
	c.boot(slot.A, 50*time.Millisecond)
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if did, settled := c.did(); did == "reboot" {
			if settled != 0 {
				t.Error("TrialEnded is called for a slot that was given up")
			}
			break
		}
		if time.Now().After(end) {
			t.Fatal("the machine is not rebooted")
		}
	}
	c.want(slot.Env{Good: slot.B, Failed: slot.A})
}

// TestGoodInTime checks that a slot that was marked good in time stays after the limit.
func TestGoodInTime(t *testing.T) {
	c := newComputer(t)
	New(Options{Disk: c.disk, Running: slot.A, Limit: 1, Log: slog.New(slog.DiscardHandler), Machine: func(verb string) error { t.Errorf("the machine does %s", verb); return nil }}).await(context.Background())
	c.want(slot.Env{Good: slot.A})
}

// TestUnreadable checks that an unreadable disk is reported, and that nothing is done without its
// data.
func TestUnreadable(t *testing.T) {
	ctx := context.Background()
	c := newComputer(t)
	h, _ := c.boot(slot.A, 0)
	if _, err := h.Status(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.disk.Dir, "env"), make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	data, sig := c.release("1.1", 11)
	const why = "block"
	_, err := h.Status(ctx)
	c.refuses(err, why)
	c.refuses(h.Write(ctx, int64(len(data)), sig, false, bytes.NewReader(data)), why)
	c.refuses(h.Do(ctx, DoTry), why)
	c.refuses(h.Do(ctx, DoReject), why)
	c.refuses(New(Options{Disk: c.disk, Running: slot.A}).Serve(ctx, nil), why)
}

// TestCallerGoes checks that a caller that sends a part of a slot and leaves, leaves an empty slot
// and does not block the next one.
func TestCallerGoes(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	c := newComputer(t)
	h, _ := c.boot(slot.A, 0)
	data, sig := c.release("1.1", 11)
	started := make(chan struct{})
	body := io.MultiReader(bytes.NewReader(data[:slotSize/2]), readFunc(func([]byte) (int, error) {
		close(started)
		<-ctx.Done()
		return 0, ctx.Err()
	}))
	ended := make(chan error, 1)
	go func() { ended <- h.Write(ctx, int64(len(data)), sig, false, body) }()
	<-started
	c.refuses(h.Write(context.Background(), int64(len(data)), sig, false, bytes.NewReader(data)), "another upgrade is under way")
	c.refuses(h.Do(context.Background(), DoTry), "another upgrade is under way")
	cancel()
	if err := <-ended; err == nil {
		t.Error("a write that ended early succeeded")
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := h.Write(context.Background(), int64(len(data)), sig, false, bytes.NewReader(data))
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }
