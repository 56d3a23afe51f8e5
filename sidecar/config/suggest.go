package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// suggestion names the key that was probably meant, or else all there are.
func suggestion(wrong string, fields map[string]int) string {
	names := slices.Sorted(maps.Keys(fields))
	best, bestDistance := "", len(wrong)/3+2 // farther off is no misspelling
	for _, name := range names {
		if d := editDistance(strings.ToLower(wrong), name); d < bestDistance {
			best, bestDistance = name, d
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %s?", best)
	}
	return "; known here: " + strings.Join(names, ", ")
}

// editDistance counts the insertions, deletions and replacements between a and b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
