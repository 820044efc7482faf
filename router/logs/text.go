package logs

import (
	"encoding"
	"fmt"
	"log/slog"
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Hide is a ReplaceAttr (slog.HandlerOptions) for the handler that writes the log. Secrets are
// bytes, and slog.TextHandler writes bytes as text, even those of types that hide themselves with
// String. Hide replaces bytes by their text form, and those without one by their number.
func Hide(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() != slog.KindAny || !areBytes(a.Value.Any()) {
		return a
	}
	return slog.String(a.Key, text(a.Value))
}

// areBytes reports whether a value is a slice or an array of bytes.
func areBytes(v any) bool {
	t := reflect.TypeOf(v)
	return t != nil && (t.Kind() == reflect.Slice || t.Kind() == reflect.Array) && t.Elem().Kind() == reflect.Uint8
}

// text returns the text of a resolved value, as slog.TextHandler with Hide writes it.
func text(v slog.Value) (s string) {
	switch v.Kind() {
	case slog.KindTime:
		return v.Time().Format("2006-01-02T15:04:05.000Z07:00")
	case slog.KindAny:
	default:
		return v.String()
	}
	defer func() {
		// A method may panic, as one of a nil pointer does.
		if p := recover(); p != nil {
			s = fmt.Sprintf("!PANIC: %v", p)
			if r := reflect.ValueOf(v.Any()); r.Kind() == reflect.Pointer && r.IsNil() {
				s = "<nil>"
			}
		}
	}()
	switch value := v.Any().(type) {
	case encoding.TextMarshaler:
		data, err := value.MarshalText()
		if err != nil {
			return fmt.Sprintf("!ERROR:%v", err)
		}
		return string(data)
	case error, fmt.Formatter, fmt.Stringer:
	default:
		if areBytes(value) {
			return fmt.Sprintf("(%d bytes)", reflect.ValueOf(value).Len())
		}
	}
	return fmt.Sprintf("%+v", v.Any())
}

// cutMark ends a text that was cut.
const cutMark = "... (cut)"

// clean returns a copy of a text with at most so many bytes, as valid UTF-8 without control
// characters. It writes those as Go does, such as \n.
func clean(s string, most int) string {
	long := len(s) > most
	s = s[:min(len(s), most)]
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unprintable) {
		s = escaped(s)
	}
	if long || len(s) > most {
		return strings.ToValidUTF8(s[:min(len(s), most-len(cutMark))], "") + cutMark
	}
	return strings.Clone(s) // the caller's may be a part of a text without a bound
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

func escaped(s string) string {
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], string(utf8.RuneError)):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unprintable(r):
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
