package e2e

import (
	"fmt"
	"os"
	"testing"

	"github.com/isthmus-net/isthmus/test/vm"
)

// payload are the files that the guest needs next to the test binary.
var payload = []string{"../../bin/e2e/isthmusd", "../../bin/e2e/isthmus", "../../router/spec/testdata/fifteen.yaml"}

// TestMain builds the programs, and runs the tests in the guest of test/vm where this kernel lacks
// something.
func TestMain(m *testing.M) {
	if !vm.Inside() {
		if err := Build("../.."); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	vm.TestMain(closing{m}, payload...)
}

// closing runs the tests, and then removes the topology that the last one has kept.
type closing struct{ *testing.M }

func (c closing) Run() int {
	status := c.M.Run()
	if kept != nil {
		if err := kept.c.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return status
}
