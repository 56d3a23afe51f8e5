// Package mutants shows that the simulator can fail: it breaks the consensus
// core, the runner's engine and the slot log in one place at a time, and wants
// the simulator to notice.
//
// The bugs are in no binary that is shipped, nor in the source: the test writes
// changed copies of files, in which each change is guarded by a variable, and
// builds one test binary of the simulator from them with go build's -overlay.
package mutants
