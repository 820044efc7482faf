package e2e

import (
	"testing"

	"github.com/isthmus-net/isthmus/test/vm"
)

// TestMain runs the tests in the guest of test/vm where this kernel lacks something.
func TestMain(m *testing.M) { vm.TestMain(m) }
