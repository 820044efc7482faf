package main

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const protected = "ISTHMUSD_TEST_PROTECTED"

// TestProtect checks that a process that protects itself is not dumpable and leaves no core file.
func TestProtect(t *testing.T) {
	if os.Getenv(protected) != "" {
		if err := protect(); err != nil {
			t.Fatal(err)
		}
		var core unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
			t.Fatal(err)
		}
		dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(os.Stderr, "core %d %d, dumpable %d", core.Cur, core.Max, dumpable)
		os.Exit(0)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestProtect$")
	cmd.Env = append(os.Environ(), protected+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "core 0 0, dumpable 0" {
		t.Errorf("the process prints %q: %v", out, err)
	}
}

func TestBuilt(t *testing.T) {
	if at := built(); at.Before(released) || at.After(time.Now()) {
		t.Errorf("built at %v", at)
	}
}
