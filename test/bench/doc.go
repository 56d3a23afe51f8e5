// Command bench measures Quorate beside what PostgreSQL itself offers for the
// same purpose, in one run on one machine.
//
//	go run ./test/bench [-only REGEXP] [-v]
//
// It prints a table and then, last, a line a figure:
//
//	bench NAME quorate=V peer=V ratio=R target=<=T unit=U
//
// ratio is quorate ÷ peer. A target of none marks what is told and not judged.
// With SHORT=1 in the environment the turns are few and short.
//
// What always holds:
//
//   - Contenders take turns (A B A B …) on servers with the same settings, fed
//     by the same pgbench with prepared statements; over the same relays where
//     there is a delay, which is measured beside them.
//   - A turn begins when what the turns before it left behind is applied in
//     every replica of both contenders.
//   - A figure is made of everything its turns measured: latencies of all turns
//     together, throughput as the median of the turns. Nothing is left out but
//     one turn of each contender before the first that counts.
//   - A part that fails fails the command, after the figures of the others.
package main
