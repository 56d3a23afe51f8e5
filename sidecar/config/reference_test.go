package config

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write docs/configuration.md anew from the comments of config.go")

const referencePath = "../../docs/configuration.md"

// TestReference holds docs/configuration.md to the comments and defaults here.
func TestReference(t *testing.T) {
	want := reference(t)
	if *rewrite {
		if err := os.WriteFile(referencePath, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(referencePath)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what config.go says; run: go test ./sidecar/config -run TestReference -rewrite", referencePath)
	}
	for _, key := range keys(reflect.TypeFor[Config](), "") {
		if !strings.Contains(string(got), "`"+key+"`") {
			t.Errorf("%s does not describe %s", referencePath, key)
		}
	}
}

// keys lists every setting, without the sections.
func keys(t reflect.Type, section string) []string {
	var all []string
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		key := joinKey(section, name)
		switch ft := t.Field(i).Type; ft.Kind() {
		case reflect.Struct:
			all = append(all, keys(ft, key)...)
		case reflect.Slice:
			if ft.Elem().Kind() != reflect.Struct {
				all = append(all, key)
				continue
			}
			all = append(all, keys(ft.Elem(), key+"[]")...)
		default:
			all = append(all, key)
		}
	}
	return all
}

func reference(t *testing.T) string {
	comments := commentsOf(t, "config.go")
	var b strings.Builder
	b.WriteString(`# Configuration

` + "`quorate run --config FILE`" + ` reads one YAML file, by custom ` + "`region.yaml`" + `. A key that is not
described here is refused, with its line. Durations are written as ` + "`100ms`, `2s`, `24h`" + `; sizes as
` + "`64MiB`, `1GB`" + ` or a number of bytes. ` + "`quorate check --config FILE`" + ` tells all that is wrong at once.

The least a file must say:

` + "```yaml" + `
` + minimal + "```\n")
	section(&b, comments, "", "Config", reflect.ValueOf(Default()))
	return b.String()
}

func section(b *strings.Builder, comments map[string]string, prefix, typeName string, v reflect.Value) {
	type nested struct {
		prefix, typeName string
		value            reflect.Value
	}
	var below []nested
	title := strings.TrimSuffix(prefix, "[]")
	if title == "" {
		b.WriteString("\n## The region\n\n")
	} else {
		fmt.Fprintf(b, "\n## %s\n\n%s\n\n", title, comments[typeName])
	}
	b.WriteString("| setting | default | |\n|---|---|---|\n")
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		key := joinKey(prefix, name)
		switch f.Type.Kind() {
		case reflect.Struct:
			below = append(below, nested{key, f.Type.Name(), v.Field(i)})
		case reflect.Slice:
			if f.Type.Elem().Kind() != reflect.Struct {
				fmt.Fprintf(b, "| `%s` | none | %s |\n", key, comments[typeName+"."+f.Name])
				continue
			}
			below = append(below, nested{key + "[]", f.Type.Elem().Name(), reflect.Zero(f.Type.Elem())})
		default:
			fmt.Fprintf(b, "| `%s` | %s | %s |\n", key, defaultText(key, v.Field(i)), comments[typeName+"."+f.Name])
		}
	}
	for _, n := range below {
		section(b, comments, n.prefix, n.typeName, n.value)
	}
}

func defaultText(key string, v reflect.Value) string {
	switch value := v.Interface().(type) {
	case string:
		if value == "" {
			return "none"
		}
	case time.Duration:
		if value%time.Hour == 0 {
			return fmt.Sprintf("`%dh`", value/time.Hour)
		}
	}
	return fmt.Sprintf("`%v`", v.Interface())
}

// commentsOf maps "Type" and "Type.Field" to their comments on one line each,
// the Go name at the beginning taken off.
func commentsOf(t *testing.T, file string) map[string]string {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	plain := func(name string, group *ast.CommentGroup) string {
		text := strings.Join(strings.Fields(group.Text()), " ")
		for _, lead := range []string{name + " is ", name + " are ", name + " "} {
			if rest, ok := strings.CutPrefix(text, lead); ok {
				text = rest
				break
			}
		}
		if text == "" {
			return ""
		}
		return strings.ReplaceAll(strings.ToUpper(text[:1])+text[1:], "|", `\|`)
	}
	comments := map[string]string{}
	for _, declaration := range parsed.Decls {
		general, ok := declaration.(*ast.GenDecl)
		if !ok || general.Tok != token.TYPE {
			continue
		}
		for _, spec := range general.Specs {
			typeSpec := spec.(*ast.TypeSpec)
			structType, ok := typeSpec.Type.(*ast.StructType)
			if !ok {
				continue
			}
			comments[typeSpec.Name.Name] = plain(typeSpec.Name.Name, general.Doc)
			for _, f := range structType.Fields.List {
				comment := plain(f.Names[0].Name, f.Doc)
				if _, nested := f.Type.(*ast.Ident); nested && comment == "" && ast.IsExported(f.Type.(*ast.Ident).Name) {
					continue // a section: its type is described
				}
				if comment == "" {
					t.Errorf("%s: setting %s.%s has no comment", file, typeSpec.Name.Name, f.Names[0].Name)
				}
				comments[typeSpec.Name.Name+"."+f.Names[0].Name] = comment
			}
		}
	}
	return comments
}
