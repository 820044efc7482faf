package router

import (
	"testing"

	"github.com/isthmus-net/isthmus/router/flow"
)

func TestLogConditions(t *testing.T) {
	for _, k := range []struct {
		status flow.Status
		want   []string
	}{
		{flow.Status{Records: 7, Overruns: 3, Unheard: 2}, nil},
		{flow.Status{Problems: []string{"run 3: damaged", "writing: no space left on device"}}, []string{"TranslationLogDamaged"}},
		{flow.Status{Damaged: 1}, []string{"TranslationLogIncomplete"}},
		{flow.Status{Lost: 5, Problems: []string{"x"}}, []string{"TranslationLogDamaged", "TranslationLogIncomplete"}},
	} {
		got := logConditions(k.status)
		if len(got) != len(k.want) {
			t.Fatalf("%+v: %v, want %v", k.status, got, k.want)
		}
		for i, c := range got {
			if c.Type != k.want[i] || c.Message == "" || c.Severity == "" {
				t.Errorf("%+v: %v, want %v", k.status, c, k.want[i])
			}
		}
	}
}
