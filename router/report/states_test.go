package report

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"testing"
)

// TestStatesAreComplete checks that the lists of states have every constant of their type: metrics
// have a series for each.
func TestStatesAreComplete(t *testing.T) {
	for file, c := range map[string]struct {
		kind   string
		states []string
	}{
		"../../tunnel/state.go":      {"Status", TunnelStates()},
		"../../bgp/state.go":         {"SessionState", PeerStates()},
		"../egress/health/member.go": {"Status", AddressStates()},
	} {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		ast.Inspect(parsed, func(node ast.Node) bool {
			v, ok := node.(*ast.ValueSpec)
			if !ok || len(v.Values) != 1 {
				return true
			}
			if of, ok := v.Type.(*ast.Ident); !ok || of.Name != c.kind {
				return true
			}
			n++
			state, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil || !slices.Contains(c.states, state) {
				t.Errorf("%s: %q is not in the list %q", file, state, c.states)
			}
			return true
		})
		if n < 4 {
			t.Errorf("%s: only %d constants of type %s", file, n, c.kind)
		}
	}
}
