package config

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Fault is one thing wrong with a file.
type Fault struct {
	File string
	Line int    // 0 if the fault is of no line: a setting that is missing altogether
	Key  string // such as consensus.lease_duration or regions[2].peer; may be empty
	Text string
}

func (f *Fault) Error() string {
	var b strings.Builder
	b.WriteString(f.File)
	if f.Line > 0 {
		fmt.Fprintf(&b, ":%d", f.Line)
	}
	b.WriteString(": ")
	if f.Key != "" {
		b.WriteString(f.Key + ": ")
	}
	b.WriteString(f.Text)
	return b.String()
}

// Load reads and checks the file at path. Its error joins one *Fault for each
// thing wrong, or is that of reading the file.
func Load(path string) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(path, text)
}

// Parse is Load for text that is at hand; file is how faults name it.
func Parse(file string, text []byte) (Config, error) {
	d := decoder{file: file, lines: map[string]int{}, refused: map[string]bool{}}
	c := Default()
	var document yaml.Node
	if err := yaml.Unmarshal(text, &document); err != nil {
		return Config{}, yamlFault(file, err)
	}
	if len(document.Content) > 0 { // none: an empty file
		d.value(document.Content[0], "", reflect.ValueOf(&c).Elem())
	}
	if len(d.faults) == 0 || len(d.lines) > 0 { // not if this is no configuration at all
		d.validate(c)
	}
	c.fill()
	if len(d.faults) > 0 {
		slices.SortStableFunc(d.faults, func(a, b *Fault) int { return a.Line - b.Line })
		errs := make([]error, len(d.faults))
		for i, f := range d.faults {
			errs[i] = f
		}
		return Config{}, errors.Join(errs...)
	}
	return c, nil
}

// yamlFault makes a Fault of the library's "yaml: line 3: …".
func yamlFault(file string, err error) error {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if number, what, ok := strings.Cut(rest, ": "); ok {
			if line, err := strconv.Atoi(number); err == nil {
				return &Fault{File: file, Line: line, Text: "not YAML: " + what}
			}
		}
	}
	return &Fault{File: file, Text: "not YAML: " + text}
}

// decoder walks the document and a Config side by side. It remembers the line of
// every key, for the faults that show only when values are compared.
type decoder struct {
	file    string
	lines   map[string]int
	refused map[string]bool // keys whose value could not be read: already reported
	faults  []*Fault
}

func (d *decoder) fault(line int, key, format string, args ...any) {
	d.faults = append(d.faults, &Fault{File: d.file, Line: line, Key: key, Text: fmt.Sprintf(format, args...)})
}

// refuse reports a value that cannot be read.
func (d *decoder) refuse(n *yaml.Node, key, format string, args ...any) {
	d.refused[key] = true
	d.fault(n.Line, key, format, args...)
}

func (d *decoder) value(n *yaml.Node, key string, v reflect.Value) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Tag == "!!null" { // "key:" with nothing after it leaves the default
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.mapping(n, key, v)
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			d.refuse(n, key, "expected a list, each item beginning with \"- \"")
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, item := range n.Content {
			itemKey := fmt.Sprintf("%s[%d]", key, i)
			d.lines[itemKey] = item.Line
			d.value(item, itemKey, v.Index(i))
		}
	default:
		d.scalar(n, key, v)
	}
}

func (d *decoder) mapping(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		d.refuse(n, key, "expected settings, one \"key: value\" a line")
		return
	}
	fields := fieldsOf(v.Type())
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, value := n.Content[i], n.Content[i+1]
		full := joinKey(key, name.Value)
		if first, ok := seen[name.Value]; ok {
			d.fault(name.Line, full, "given twice; first at line %d", first)
			continue
		}
		seen[name.Value] = name.Line
		index, ok := fields[name.Value]
		if !ok {
			d.fault(name.Line, full, "unknown setting%s", suggestion(name.Value, fields))
			continue
		}
		d.lines[full] = name.Line
		d.value(value, full, v.Field(index))
	}
}

func (d *decoder) scalar(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.ScalarNode {
		d.refuse(n, key, "expected one value")
		return
	}
	switch p := v.Addr().Interface().(type) {
	case *time.Duration:
		t, err := time.ParseDuration(n.Value)
		if err != nil {
			d.refuse(n, key, "%q is not a duration: write a number and a unit, such as 100ms, 2s or 24h", n.Value)
			return
		}
		*p = t
	case *ByteSize:
		size, err := ParseByteSize(n.Value)
		if err != nil {
			d.refuse(n, key, "%v", err)
			return
		}
		*p = size
	case *string:
		*p = n.Value
	case *bool:
		switch n.Value {
		case "true":
			*p = true
		case "false":
			*p = false
		default:
			d.refuse(n, key, "%q is neither true nor false", n.Value)
		}
	case *int:
		number, err := strconv.Atoi(n.Value)
		if err != nil {
			d.refuse(n, key, "%q is not a whole number", n.Value)
			return
		}
		*p = number
	case *int64:
		number, err := strconv.ParseInt(n.Value, 10, 64)
		if err != nil {
			d.refuse(n, key, "%q is not a whole number", n.Value)
			return
		}
		*p = number
	case *float64:
		number, err := strconv.ParseFloat(n.Value, 64)
		if err != nil {
			d.refuse(n, key, "%q is not a number", n.Value)
			return
		}
		*p = number
	default:
		panic(fmt.Sprintf("config: setting %s has a type this package cannot read: %T", key, p))
	}
}

// fieldsOf maps the keys of a section to its field indexes.
func fieldsOf(t reflect.Type) map[string]int {
	fields := make(map[string]int, t.NumField())
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		fields[name] = i
	}
	return fields
}

func joinKey(section, name string) string {
	if section == "" {
		return name
	}
	return section + "." + name
}
