\set id random(1, 9223372036854775806)
INSERT INTO bench_insert (id, payload) VALUES (:id, 'one row of a hundred bytes or so, as an application would write it in a transaction of its own');
