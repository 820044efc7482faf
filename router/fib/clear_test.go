package fib

import "testing"

// TestClear checks that Clear removes everything of ours in an order that the kernel accepts.
func TestClear(t *testing.T) {
	k := newFakeKernel()
	k.setLink(Link{Name: "a", Index: 7, Up: true})
	for _, err := range k.Execute(t.Context(), []Op{
		{Kind: SetNextHop, ID: firstID, Object: Object{ID: firstID, Link: 7}},
		{Kind: SetGroup, ID: firstID + 1, Members: []uint32{firstID}},
		{Kind: AddRoute, Key: key("10.0.0.0/8"), ID: firstID + 1},
		{Kind: AddRoute, Key: key("10.1.0.0/16")},
		{Kind: AddRoute, Key: inTable(100, "10.1.0.0/16"), ID: firstID + 1},
	}) {
		if err != nil {
			t.Fatal(err)
		}
	}
	if n, err := Clear(t.Context(), k); n != 5 || err != nil {
		t.Errorf("%d removed, %v", n, err)
	}
	if s := k.state(); len(s.Routes)+len(s.Groups)+len(s.NextHops) > 0 {
		t.Errorf("left: %+v", s)
	}
	if n, err := Clear(t.Context(), k); n != 0 || err != nil {
		t.Errorf("the second time: %d removed, %v", n, err)
	}
}
