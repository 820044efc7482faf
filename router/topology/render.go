package topology

import (
	"fmt"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/router/spec"
)

// Forms are the forms of a cloud's side: commands of the cloud's own command line in a POSIX shell
// script, or Terraform's language.
var Forms = []string{"cli", "terraform"}

// Parts are the parts that can be written separately: the gateways, whose outside addresses the
// clouds choose, and the tunnels, which need those of other clouds. Where gateways are linked with
// each other, one of them must be first.
var Parts = []string{"all", "gateways", "tunnels"}

// Cloud writes the configuration of all gateways of a cloud, in one of Forms and one of Parts.
func (t *Topology) Cloud(name, form, part string) (string, spec.Problems) {
	var mine []Gateway
	for _, g := range t.Gateways {
		if g.Cloud == name {
			mine = append(mine, g)
		}
	}
	if len(mine) == 0 {
		return "", spec.Problems{{Path: "gateways", Value: name, Rule: "is a cloud without gateways in this topology", Remedy: "choose one of " + strings.Join(t.Clouds(), ", ")}}
	}
	if !slices.Contains(Parts, part) {
		return "", spec.Problems{{Value: part, Rule: "is not a part of a cloud's side", Remedy: "choose one of " + strings.Join(Parts, ", ")}}
	}
	s := side{t: t, cloud: name, gateways: part != "tunnels", tunnels: part != "gateways"}
	render := map[string][2]func(*side, Gateway){
		"aws":   {(*side).awsCLI, (*side).awsTerraform},
		"azure": {(*side).azureCLI, (*side).azureTerraform},
		"gcp":   {(*side).gcpCLI, (*side).gcpTerraform},
	}[name]
	switch form {
	case "cli":
		s.shellHead()
		for _, g := range mine {
			render[0](&s, g)
		}
		s.shellFoot()
	case "terraform":
		s.hclHead()
		for _, g := range mine {
			render[1](&s, g)
		}
		s.outputs()
	default:
		return "", spec.Problems{{Value: form, Rule: "is not a form of a cloud's side", Remedy: "choose one of " + strings.Join(Forms, ", ")}}
	}
	return s.String(), nil
}

// side is the text of one cloud's side.
type side struct {
	strings.Builder
	t                 *Topology
	cloud             string
	gateways, tunnels bool // the parts to write

	depth int
	attrs [][2]string // attributes of the open block, not yet written
	own   [][2]string // name of an outside address of this cloud, and its expression
}

// of returns the tunnels that the gateway's own configuration contains, seen from the gateway.
// Google and AWS have no configuration for tunnels that they do not answer, and Azure has the
// connection already.
func (s *side) of(g Gateway) (out []seen) {
	for _, tu := range s.t.Tunnels {
		if own, peer, ok := tu.seenFrom(g.Name); ok && tu.Dead == "" {
			out = append(out, seen{tu, own, peer})
		}
	}
	return out
}

// seen is a tunnel seen from a gateway.
type seen struct {
	Tunnel
	own, peer End
}

// needs returns the keys of a cloud's tunnels, and the unknown outside addresses of their peers.
func (s *side) needs() (keys []Key, unknown []string) {
	for _, g := range s.t.Gateways {
		if g.Cloud != s.cloud || !s.tunnels {
			continue
		}
		for _, tu := range s.of(g) {
			if k := s.t.key(tu.Key); !slices.Contains(keys, k) {
				keys = append(keys, k)
			}
			if !tu.peer.Outside.Addr.IsValid() && !slices.Contains(unknown, tu.peer.Outside.Name) {
				unknown = append(unknown, tu.peer.Outside.Name)
			}
		}
	}
	slices.Sort(unknown)
	return keys, unknown
}

// line writes a line.
func (s *side) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if text != "" {
		text = strings.Repeat("  ", s.depth) + text
	}
	s.WriteString(text + "\n")
}

const generated = "# Made from a topology by isthmus topology render. Change the topology, not this."

func (s *side) shellHead() {
	s.line("#!/bin/sh")
	s.line(generated)
	s.line("set -eu")
	keys, unknown := s.needs()
	for _, k := range keys {
		if k.File != "" {
			s.line("%s=$(cat %s) # the pre-shared key %s", k.Environment, k.File, k.Name)
		} else {
			s.line(`: "${%s:?must hold the pre-shared key %s}"`, k.Environment, k.Name)
		}
	}
	for _, name := range unknown {
		s.line(`: "${%s:?must hold the outside address that the other cloud chose}"`, name)
	}
}

// shellFoot prints the values that the nodes and the other clouds need.
func (s *side) shellFoot() {
	if len(s.own) == 0 {
		return
	}
	s.line("")
	s.line("# For isthmus topology render --set, and for the other clouds.")
	for _, o := range s.own {
		s.line(`echo "%s=$%s"`, o[0], o[0])
	}
}

// command writes a command, one option with its value a line. With a name it stores the command's
// output in that variable.
func (s *side) command(name string, words string, options ...string) {
	end := ""
	if name != "" {
		words, end = name+"=$("+words, ")"
	}
	lines := append([]string{words}, options...)
	s.line("%s%s", strings.Join(lines, " \\\n  "), end)
}

// commandWithKey is command with a key through standard input, because other users can see the
// arguments of a command.
func (s *side) commandWithKey(words string, options []string, input string) {
	s.line("%s <<KEY", strings.Join(append([]string{words}, options...), " \\\n  "))
	s.line("%s", input)
	s.line("KEY")
}

// shellAddress returns the outside address of a peer as a word of a command.
func shellAddress(a Address) string {
	if a.Addr.IsValid() {
		return a.Addr.String()
	}
	return `"$` + a.Name + `"`
}

func (s *side) hclHead() {
	s.line(generated)
	keys, unknown := s.needs()
	for _, k := range keys {
		s.line("")
		if k.File != "" {
			s.line(`# export TF_VAR_%s="$(cat %s)"`, lower("psk_"+k.Name), k.File)
		} else {
			s.line(`# export TF_VAR_%s="$%s"`, lower("psk_"+k.Name), k.Environment)
		}
		s.block(fmt.Sprintf("variable %q", lower("psk_"+k.Name)), func() {
			s.attr("description", quote("Pre-shared key "+k.Name))
			s.attr("type", "string")
			s.attr("sensitive", "true")
		})
	}
	for _, name := range unknown {
		s.line("")
		s.block(fmt.Sprintf("variable %q", lower(name)), func() {
			s.attr("description", quote("Outside address that the other cloud chose"))
			s.attr("type", "string")
		})
	}
}

// outputs writes the values that the nodes and the other clouds need.
func (s *side) outputs() {
	for _, o := range s.own {
		s.line("")
		s.block(fmt.Sprintf("output %q", lower(o[0])), func() { s.attr("value", o[1]) })
	}
}

// resource writes a block with a type and a name, after an empty line.
func (s *side) resource(kind, name string, body func()) {
	s.line("")
	s.block(fmt.Sprintf("resource %q %q", kind, name), body)
}

// block writes a block.
func (s *side) block(open string, body func()) {
	if len(s.attrs) > 0 {
		s.flush()
		s.line("")
	}
	s.line("%s {", open)
	s.depth++
	body()
	s.flush()
	s.depth--
	s.line("}")
}

// attr adds an attribute to the open block.
func (s *side) attr(name, expression string) { s.attrs = append(s.attrs, [2]string{name, expression}) }

// flush writes the attributes with aligned equals signs.
func (s *side) flush() {
	width := 0
	for _, a := range s.attrs {
		width = max(width, len(a[0]))
	}
	for _, a := range s.attrs {
		s.line("%-*s = %s", width, a[0], a[1])
	}
	s.attrs = nil
}

// quote formats a text as a string of Terraform's language, without interpolation.
func quote(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "${", "$${", "%{", "%%{").Replace(text) + `"`
}

func quotes(list ...string) string {
	var out []string
	for _, s := range list {
		out = append(out, quote(s))
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// hclAddress returns the outside address of a peer as an expression.
func hclAddress(a Address) string {
	if a.Addr.IsValid() {
		return quote(a.Addr.String())
	}
	return "var." + lower(a.Name)
}

func hclKey(name string) string { return "var." + lower("psk_"+name) }
