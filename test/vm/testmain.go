package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// Missing returns which of ESP, xfrm interfaces, WireGuard and VRF this machine's kernel lacks,
// each in a word. It makes a network namespace to probe them.
func Missing() ([]string, error) {
	const script = `ip link add x type xfrm dev lo if_id 1 || echo xfrm-interface
ip link add w type wireguard || echo wireguard
ip link add v type vrf table 9 || echo vrf
ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 1 mode tunnel aead 'rfc4106(gcm(aes))' 0x0102030405060708090a0b0c0d0e0f1011121314 128 || echo esp`
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.Output()
	if err != nil && len(out) == 0 {
		return nil, fmt.Errorf("trying the kernel: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// TestMain is for the TestMain of packages whose tests need the features that Missing probes: it
// runs them here if nothing is missing, and otherwise runs this test binary in the guest, together
// with the payload, and exits with its status; files that the tests leave in /out go to
// $ISTHMUS_OUT, if set. On a machine without root it says so and fails.
func TestMain(m interface{ Run() int }, payload ...string) {
	if Inside() {
		os.Exit(m.Run())
	}
	missing, err := Missing()
	if err == nil && len(missing) == 0 {
		os.Exit(m.Run())
	}
	if err == nil {
		fmt.Fprintf(os.Stderr, "vm: this kernel lacks %s: running in a guest\n", strings.Join(missing, ", "))
		var status int
		if status, err = testInGuest(payload, os.Args[1:]); err == nil {
			os.Exit(status)
		}
	}
	fmt.Fprintln(os.Stderr, "vm:", err)
	os.Exit(1)
}

// InGuest runs the test t alone in the guest, together with the payload, and fails it if it fails
// there: a test that changes the machine, such as its clock, must not run here whatever the kernel
// has.
func InGuest(t interface {
	Helper()
	Name() string
	Fatalf(format string, args ...any)
}, payload ...string) {
	t.Helper()
	// The last flag of a name counts.
	if status, err := testInGuest(payload, append(os.Args[1:len(os.Args):len(os.Args)], "-test.run=^"+t.Name()+"$")); err != nil || status != 0 {
		t.Fatalf("in the guest: status %d, %v", status, err)
	}
}

func testInGuest(payload, args []string) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := Config{Out: os.Getenv("ISTHMUS_OUT"), Payload: append(payload, self), Stdout: os.Stdout, Stderr: os.Stderr, Progress: os.Stderr}
	c.Command = []string{"./" + self[strings.LastIndexByte(self, '/')+1:]}
	for _, a := range args {
		// go test's file to find out what to cache, which is not there in the guest
		if !strings.HasPrefix(a, "-test.testlogfile") {
			c.Command = append(c.Command, a)
		}
		if d, ok := strings.CutPrefix(a, "-test.timeout="); ok {
			c.Limit, _ = time.ParseDuration(d)
		}
	}
	if c.Limit > 0 {
		c.Limit += 10 * time.Second // the test's own time limit prints more
	}
	for _, e := range os.Environ() {
		if strings.HasPrefix(e, "ISTHMUS_") && !strings.HasPrefix(e, "ISTHMUS_CACHE=") {
			c.Env = append(c.Env, e)
		}
	}
	status, err := Run(ctx, c)
	if errors.Is(err, context.Canceled) {
		return 130, nil
	}
	return status, err
}
