package e2e

import (
	"fmt"
	"os"
	"testing"

	"github.com/isthmus-net/isthmus/test/vm"
)

// payload are the files that the guest needs besides the test binary.
var payload = []string{"../../bin/isthmusd", "../../bin/isthmus", "../../router/spec/testdata/fifteen.yaml"}

// TestMain builds the programs, and runs the tests in the guest of test/vm where this kernel lacks
// something.
func TestMain(m *testing.M) {
	if !vm.Inside() {
		if err := Build("../.."); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	vm.TestMain(m, payload...)
}
