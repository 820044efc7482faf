package condition

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestKinds(t *testing.T) {
	if !slices.IsSortedFunc(All, func(a, b *Kind) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("the kinds are not in order of name")
	}
	for i, k := range All {
		if i > 0 && All[i-1].Name == k.Name {
			t.Errorf("%s is listed twice", k.Name)
		}
		if len(k.Severities) == 0 || !slices.Contains([]string{"node", "tunnel", "peer", "route", "link"}, k.Of) {
			t.Errorf("%s: severities %v, of %q", k.Name, k.Severities, k.Of)
		}
		for what, text := range map[string]string{"meaning": k.Meaning, "cause": k.Cause, "remedy": k.Remedy} {
			if !strings.HasSuffix(text, ".") {
				t.Errorf("%s: the %s is not a sentence: %q", k.Name, what, text)
			}
		}
		if found, ok := Lookup(strings.ToLower(k.Name)); !ok || found != k {
			t.Errorf("%s cannot be looked up", k.Name)
		}
	}
	if _, ok := Lookup("NoSuchKind"); ok {
		t.Error("a kind that does not exist was found")
	}
}

func TestMake(t *testing.T) {
	at := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	c := PoolDown.Error(at, "pool %s", "p")
	if c.Type != "PoolDown" || c.Severity != "error" || c.Message != "pool p" || !c.Since.AsTime().Equal(at) {
		t.Errorf("%v", c)
	}
	if c := PortsLow.Warning(time.Time{}, "x"); c.Since != nil {
		t.Errorf("%v", c)
	}
	defer func() {
		if recover() == nil {
			t.Error("a severity that the kind does not have was taken")
		}
	}()
	PoolDown.Warning(at, "x")
}

// TestEveryKindIsUsed reads the source: a kind that nothing reports is not to be documented, and
// none is reported with a severity that it does not have.
func TestEveryKindIsUsed(t *testing.T) {
	var source strings.Builder
	for _, root := range []string{"../../router", "../../cmd"} {
		err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "/condition/") {
				return err
			}
			data, err := os.ReadFile(path)
			source.Write(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	text := source.String()
	for _, k := range All {
		if !strings.Contains(text, "condition."+k.Name+".") && !strings.Contains(text, "condition."+k.Name+"\n") {
			t.Errorf("nothing reports %s", k.Name)
		}
		for s, method := range map[Severity]string{Error: "Error(", Warning: "Warning("} {
			if strings.Contains(text, "condition."+k.Name+"."+method) && !slices.Contains(k.Severities, s) {
				t.Errorf("%s is reported with the severity %s", k.Name, s)
			}
		}
	}
	// apitest answers as a node would; everything else makes conditions here.
	if n := strings.Count(text, "isthmusv1.Condition{Type:"); n > 1 {
		t.Errorf("%d conditions are made without their kind", n)
	}
}
