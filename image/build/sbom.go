package build

import (
	"bytes"
	"debug/buildinfo"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// programs are the Go programs of the image, whose modules are in the SBOM.
var programs = []string{"usr/sbin/isthmusd", "usr/bin/isthmus"}

// sbom lists the parts of the slot, as CycloneDX 1.6 in JSON: Debian's packages from dpkg's status
// file, and the modules of our programs from the linker's build information. It has no time and no
// random number: equal slots have equal lists.
func (b *builder) sbom() (text []byte, packages int, err error) {
	status, err := os.ReadFile(b.in("var/lib/dpkg/status"))
	if err != nil {
		return nil, 0, err
	}
	components := Packages(string(status))
	packages = len(components)
	modules := map[string]cdx.Component{}
	for _, p := range programs {
		info, err := buildinfo.ReadFile(b.in(p))
		if err != nil {
			return nil, 0, fmt.Errorf("reading the modules of %s: %w", p, err)
		}
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			purl := "pkg:golang/" + m.Path + "@" + m.Version
			modules[purl] = cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: m.Path, Version: m.Version, PackageURL: purl}
		}
		purl := "pkg:golang/stdlib@" + strings.TrimPrefix(info.GoVersion, "go")
		modules[purl] = cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: "stdlib", Version: strings.TrimPrefix(info.GoVersion, "go"), PackageURL: purl}
	}
	for _, m := range modules {
		components = append(components, m)
	}
	slices.SortFunc(components, func(a, b cdx.Component) int { return strings.Compare(a.BOMRef, b.BOMRef) })
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Component: &cdx.Component{BOMRef: "isthmus", Type: cdx.ComponentTypeOS, Name: "isthmus", Version: b.Version}}
	bom.Components = &components
	var out bytes.Buffer
	if err := cdx.NewBOMEncoder(&out, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return nil, 0, err
	}
	lib := b.in("usr/share/isthmus")
	if err := os.MkdirAll(lib, 0o755); err != nil {
		return nil, 0, err
	}
	return out.Bytes(), packages, os.WriteFile(filepath.Join(lib, "sbom.json"), out.Bytes(), 0o644)
}

// Packages reads the status file of dpkg (dpkg(1), deb822(5)) and returns the installed packages,
// without those that only the build needs.
func Packages(status string) (out []cdx.Component) {
	for paragraph := range strings.SplitSeq(status, "\n\n") {
		field := map[string]string{}
		for line := range strings.Lines(paragraph) {
			if name, value, ok := strings.Cut(line, ": "); ok && !strings.HasPrefix(line, " ") {
				field[name] = strings.TrimSpace(value)
			}
		}
		if field["Status"] != "install ok installed" || slices.Contains(building, field["Package"]) {
			continue
		}
		// github.com/package-url/purl-spec, type deb.
		purl := fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", field["Package"], url.QueryEscape(field["Version"]), field["Architecture"])
		out = append(out, cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: field["Package"], Version: field["Version"], PackageURL: purl})
	}
	return out
}
