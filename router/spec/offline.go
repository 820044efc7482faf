package spec

import (
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/router/secret"
)

// Offline checks a document without a node. It returns its problems, and notes about what only the
// node can check: secrets, and the addresses that a platform reports.
func Offline(text []byte) (problems, notes Problems) {
	d, found := Decode(text)
	s, more := Check(d, func(name string) (secret.Ref, bool) { return secret.Ref{Name: name}, true })
	for _, p := range Join(found, more) {
		if p.Value == Auto && p.Rule == unknownFacts {
			p.Rule, p.Remedy = "is known on the node alone: it was not checked, and neither was what depends on it", ""
			notes = append(notes, p)
		} else {
			problems = append(problems, p)
		}
	}
	if len(problems) > 0 {
		return problems, notes
	}
	var names []string
	for _, u := range s.Secrets {
		if !slices.Contains(names, u.Name) {
			names = append(names, u.Name)
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		notes = append(notes, Problem{Rule: "uses secrets, which were not checked: " + strings.Join(names, ", "), Remedy: "on the node, `isthmus get secrets` lists those that are stored"})
	}
	if len(notes) == 0 || notes[0].Value != Auto {
		notes = append(notes, s.Notes()...)
	}
	return nil, notes
}
