package fault

import (
	"errors"
	"io/fs"
	"testing"
)

func TestNotFound(t *testing.T) {
	if !errors.Is(ErrNotFound, fs.ErrNotExist) || ErrNotFound.Error() != "not found" {
		t.Errorf("%q", ErrNotFound)
	}
}
