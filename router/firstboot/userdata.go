// Package firstboot makes a new machine a node without a login: it reads the machine's user-data
// once, applies the first document, signs the first admin's certificate request, and shows the
// admin's context on the console. Then it keeps reading the platform's facts about the machine.
package firstboot

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/spec"
)

// UserData is checked user-data.
type UserData struct {
	Digest   string // SHA-256 of the text, in hexadecimal
	Document string
	URL      string
	SHA256   string
	API      []netip.Prefix
	Admin    *Admin // nil: no request is signed
	Hosts    []string
	Shell    bool
	Quiet    bool // do not report to Azure that the node is ready
}

// Admin is a certificate request to sign.
type Admin struct {
	Name     string
	Request  []byte // DER
	Lifetime time.Duration
}

// Header is the first line of user-data that is for isthmus.
const Header = "#isthmus"

const (
	maxHosts = 16
	maxURL   = 2048
)

var (
	ours     = regexp.MustCompile(`(?m)^["']?isthmus["']?\s*:`)
	hostRule = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$`)
	sumRule  = regexp.MustCompile(`^[0-9a-fA-F]{64}$`)
)

// Foreign describes user-data that is not for isthmus; empty: it is for isthmus.
func Foreign(data []byte) string {
	first, _, _ := bytes.Cut(data, []byte("\n"))
	line := strings.TrimRight(string(first), " \t\r")
	switch {
	case len(bytes.TrimSpace(data)) == 0:
		return "nothing"
	case line == Header:
		return ""
	case strings.HasPrefix(line, "#!"):
		return "a script"
	case strings.HasPrefix(line, "#cloud-config"):
		return "a cloud-config"
	case bytes.HasPrefix(data, []byte{0x1f, 0x8b}):
		return "compressed data"
	case strings.HasPrefix(strings.ToLower(line), "content-type:") || strings.HasPrefix(strings.ToLower(line), "mime-version:"):
		return "a MIME message"
	case ours.Match(data):
		return ""
	}
	return "text of another kind"
}

// Digest returns the hash that identifies user-data.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Parse checks user-data that is for isthmus. It finds all problems at once.
func Parse(data []byte) (*UserData, spec.Problems) {
	var m isthmusv1.UserData
	lines, problems := spec.DecodeMessage(data, &m)
	f := spec.NewFields(lines, problems)
	u := &UserData{Digest: Digest(data), Document: m.GetDocument(), URL: m.GetDocumentUrl(), SHA256: strings.ToLower(m.GetDocumentSha256()), Quiet: m.ReportReady != nil && !m.GetReportReady()}
	if v := m.GetIsthmus(); v != 1 && !(v == 0 && lines["isthmus"] == 0) {
		f.Problem("isthmus", fmt.Sprint(v), "is not a version that this node reads", "write `isthmus: 1`")
	}
	switch {
	case u.URL == "" && u.SHA256 != "":
		f.Missing("documentURL", "say where the document with this digest is, or leave documentSHA256 out")
	case u.URL != "" && u.Document != "":
		f.Problem("documentURL", "", "conflicts with `document`, which is given as well", "keep one of them")
	case u.URL != "":
		if p, err := url.Parse(u.URL); err != nil || p.Scheme != "https" && p.Scheme != "http" || p.Host == "" || p.User != nil || len(u.URL) > maxURL {
			f.Problem("documentURL", "", "is not a URL of https or http", fmt.Sprintf("give one without a user and a password, of at most %d bytes", maxURL))
		}
		if u.SHA256 == "" {
			f.Missing("documentSHA256", "give the digest that `sha256sum` prints for the document")
		} else if !sumRule.MatchString(u.SHA256) {
			f.Problem("documentSHA256", m.GetDocumentSha256(), "is not a SHA-256", "give the 64 hexadecimal digits that `sha256sum` prints")
		}
	}
	api, wrong := spec.Sources("access.api", m.GetAccess().GetApi())
	for _, p := range wrong {
		f.Problem(p.Path, p.Value, p.Rule, p.Remedy)
	}
	u.API = api
	if a := m.GetAdmin(); a != nil {
		u.Admin = admin(f, a)
	}
	if len(m.GetHosts()) > maxHosts {
		f.Problem("hosts", "", fmt.Sprintf("has more than %d names", maxHosts), "keep those that clients use")
	} else {
		for i, h := range m.GetHosts() {
			if _, err := netip.ParseAddr(h); err != nil && (!hostRule.MatchString(h) || len(h) > 253) {
				f.Problem(fmt.Sprintf("hosts[%d]", i), h, "is not a name or an address of a host", "write names in ASCII (xn--... for others)")
			}
		}
		u.Hosts = m.GetHosts()
	}
	switch m.GetConsole() {
	case "", "none":
	case "shell":
		u.Shell = true
	default:
		f.Problem("console", m.GetConsole(), "is not a value of console", `give "none" or "shell", or leave it out`)
	}
	return u, f.Problems()
}

func admin(f *spec.Fields, a *isthmusv1.FirstAdmin) *Admin {
	const remedy = "give the whole of what `isthmus client request` prints, as a block: `request: |`"
	if a.GetRequest() == "" {
		f.Missing("admin.request", remedy)
		return nil
	}
	block, rest := pem.Decode([]byte(a.GetRequest()))
	if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) > 0 {
		f.Problem("admin.request", "", "is not one certificate request in PEM", remedy)
		return nil
	}
	out := &Admin{Name: a.GetName(), Request: block.Bytes, Lifetime: a.GetLifetime().AsDuration()}
	common, err := auth.CheckRequest(out.Name, block.Bytes, out.Lifetime)
	if err != nil {
		f.Problem("admin", "", "cannot be signed: "+err.Error(), remedy)
		return nil
	}
	if out.Name == "" {
		out.Name = common
	}
	return out
}
