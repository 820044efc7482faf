package native

import (
	"fmt"
	"os"
	"testing"

	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/vm"
)

func TestMain(m *testing.M) {
	if !vm.Inside() {
		if err := e2e.Build("../../.."); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	vm.TestMain(m, "../../../bin/e2e/isthmusd", "../../../bin/e2e/isthmus", "../../../bin/e2e/"+e2e.CharonConf)
}
