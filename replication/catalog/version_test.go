package catalog

import "testing"

func TestVersions(t *testing.T) {
	for num, want := range map[int]bool{90624: false, 140012: false, 150000: true, 150018: true, 180001: true, 190000: false} {
		problem, ok := checkVersion(num)
		if ok != want || !ok && (!problem.Fatal || problem.Mend == "") {
			t.Errorf("version %d: %v %+v", num, ok, problem)
		}
	}
}
