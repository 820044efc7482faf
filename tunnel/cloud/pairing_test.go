package cloud

import (
	"strings"
	"testing"
)

func TestUnpaired(t *testing.T) {
	type links = []Link
	for name, tt := range map[string]struct {
		links []Link
		want  string // "TUNNEL CODE", with "sure" or "own"
	}{
		"nothing":                          {nil, ""},
		"no cloud":                         {links{{Name: "site"}}, ""},
		"one of AWS":                       {links{{Name: "aws-0", Cloud: "aws"}}, "aws-0 second-endpoint sure"},
		"both of AWS":                      {links{{Name: "aws-0", Cloud: "aws"}, {Name: "aws-1", Cloud: "aws"}}, ""},
		"two connections, one half":        {links{{Name: "vpn-1", Cloud: "aws"}, {Name: "vpn-2", Cloud: "aws"}, {Name: "tgw-1", Cloud: "aws", ASN: 7}}, "tgw-1 second-endpoint sure"},
		"names before numbers":             {links{{Name: "tgw-1", Cloud: "aws", ASN: 7}, {Name: "vpn-1", Cloud: "aws", ASN: 7}, {Name: "vpn-2", Cloud: "aws", ASN: 7}}, "tgw-1 second-endpoint sure"},
		"three of a name":                  {links{{Name: "vpn-1", Cloud: "aws"}, {Name: "vpn-2", Cloud: "aws"}, {Name: "vpn-3", Cloud: "aws"}}, "vpn-3 second-endpoint sure"},
		"other names, one number":          {links{{Name: "blue", Cloud: "aws", ASN: 64512}, {Name: "green", Cloud: "aws", ASN: 64512}}, ""},
		"other names, other numbers":       {links{{Name: "blue", Cloud: "aws", ASN: 64512}, {Name: "green", Cloud: "aws", ASN: 64513}}, "blue second-endpoint sure, green second-endpoint sure"},
		"one instance of Azure":            {links{{Name: "az", Cloud: "azure", PSK: "k"}}, "az second-instance"},
		"both, by the key":                 {links{{Name: "east", Cloud: "azure", PSK: "k"}, {Name: "west", Cloud: "azure", PSK: "k"}}, ""},
		"two gateways, one instance each":  {links{{Name: "az-1", Cloud: "azure", PSK: "k"}, {Name: "az-2", Cloud: "azure", PSK: "l"}}, "az-1 second-instance, az-2 second-instance"},
		"one of a hub":                     {links{{Name: "hub", Cloud: "azure-vwan", PSK: "k"}}, "hub second-instance sure"},
		"one of Google":                    {links{{Name: "g", Cloud: "gcp"}}, "g other-interface"},
		"one of Oracle":                    {links{{Name: "o", Cloud: "oci"}}, "o second-endpoint sure"},
		"clouds do not mix":                {links{{Name: "x-1", Cloud: "aws"}, {Name: "x-2", Cloud: "gcp"}}, "x-1 second-endpoint sure, x-2 other-interface"},
		"both wait":                        {links{{Name: "aws-0", Cloud: "aws", RespondOnly: true}, {Name: "aws-1", Cloud: "aws"}}, "aws-0 both-wait own"},
		"Azure calls, so waiting is right": {links{{Name: "az-0", Cloud: "azure", PSK: "k", RespondOnly: true}, {Name: "az-1", Cloud: "azure", PSK: "k"}}, ""},
	} {
		var got []string
		for _, p := range Unpaired(tt.links) {
			s := p.Beside + " " + p.Code
			if p.Sure {
				s += " sure"
			}
			if p.Own {
				s += " own"
			}
			got = append(got, s)
			if p.Why == "" || p.Remedy == "" || !strings.HasPrefix(p.Source, "https://") || p.Cloud == "" {
				t.Errorf("%s: %+v", name, p)
			}
		}
		if s := strings.Join(got, ", "); s != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", name, s, tt.want)
		}
	}
}

// TestEveryCloudHasAConsole: an explanation can say where its other half is set.
func TestEveryCloudHasAConsole(t *testing.T) {
	for _, p := range Presets() {
		for i, v := range []Value[string]{p.AddressAt, p.KeyAt, p.PolicyAt} {
			if v.Is == "" {
				t.Errorf("%s: %s is nowhere", p.Name, []string{"the address", "the key", "the policy"}[i])
			}
		}
	}
}
