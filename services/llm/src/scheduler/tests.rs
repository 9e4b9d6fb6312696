use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use emu2_serve::priority::OVERTAKEN_MAX;

use super::*;

const LIMITS: SchedulerLimits = SchedulerLimits { kv_entries: 100, prefill_chunk: 16 };

fn demand(prompt: usize, kv_entries: usize) -> Demand {
    Demand { prompt, ready: prompt, kv_entries, priority: Priority::Normal }
}

fn work(plan: &Plan) -> Vec<(Ticket, Work)> {
    plan.work.iter().map(|(&ticket, work)| (ticket, work.clone())).collect()
}

#[test]
fn prompts_share_the_chunk_oldest_first_beside_all_decoding() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(1, demand(4, 8)).unwrap();
    scheduler.submit(2, demand(20, 30)).unwrap();
    let plan = scheduler.plan();
    assert_eq!(plan.admitted, [1, 2]);
    assert_eq!(work(&plan), [(1, Work::Prefill(0..4)), (2, Work::Prefill(0..12))]);
    scheduler.submit(3, demand(10, 10)).unwrap();
    let plan = scheduler.plan();
    assert_eq!(work(&plan), [(1, Work::Decode), (2, Work::Prefill(12..20)), (3, Work::Prefill(0..8))]);
    assert_eq!(work(&scheduler.plan()), [(1, Work::Decode), (2, Work::Decode), (3, Work::Prefill(8..10))]);
}

#[test]
fn a_prompt_is_prefilled_as_far_as_its_embeddings_have_come() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(1, Demand { ready: 17, ..demand(40, 40) }).unwrap();
    assert_eq!(work(&scheduler.plan()), [(1, Work::Prefill(0..16))]);
    assert_eq!(work(&scheduler.plan()), [(1, Work::Prefill(16..17))]);
    assert_eq!(work(&scheduler.plan()), []);
    scheduler.set_ready(1, 30);
    assert_eq!(work(&scheduler.plan()), [(1, Work::Prefill(17..30))]);
    scheduler.set_ready(1, 40);
    assert_eq!(work(&scheduler.plan()), [(1, Work::Prefill(30..40))]);
}

#[test]
fn nothing_is_reserved_before_the_first_chunk_is_here() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(1, Demand { ready: 15, ..demand(40, 90) }).unwrap();
    scheduler.submit(2, Demand { ready: 3, ..demand(4, 60) }).unwrap();
    scheduler.submit(3, demand(4, 60)).unwrap();
    assert_eq!(scheduler.plan().admitted, [3], "who cannot start stands in nobody's way");
    assert_eq!((scheduler.reserved(), scheduler.waiting()), (60, 2));
    scheduler.set_ready(2, 4);
    scheduler.set_ready(1, 16);
    scheduler.remove(3);
    assert_eq!(scheduler.plan().admitted, [1], "the place in the queue is kept");
    scheduler.remove(1);
    assert_eq!(scheduler.plan().admitted, [2]);
}

#[test]
fn embeddings_that_arrive_while_waiting_count() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(1, demand(1, 100)).unwrap();
    scheduler.submit(2, Demand { ready: 1, ..demand(5, 5) }).unwrap();
    scheduler.plan();
    scheduler.set_ready(2, 5);
    scheduler.remove(1);
    assert_eq!(work(&scheduler.plan()), [(2, Work::Prefill(0..5))]);
}

#[test]
fn a_large_sequence_is_not_overtaken() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(1, demand(1, 60)).unwrap();
    scheduler.submit(2, demand(1, 50)).unwrap();
    scheduler.submit(3, demand(1, 10)).unwrap();
    assert_eq!(scheduler.plan().admitted, [1]);
    assert!(scheduler.plan().admitted.is_empty());
    scheduler.remove(1);
    assert_eq!(scheduler.plan().admitted, [2, 3]);
    assert_eq!(scheduler.reserved(), 60);
}

#[test]
fn a_higher_class_goes_first_but_not_for_ever() {
    let mut scheduler = Scheduler::new(LIMITS);
    let of = |priority| Demand { priority, ..demand(1, 100) };
    scheduler.submit(0, of(Priority::Normal)).unwrap();
    assert_eq!(scheduler.plan().admitted, [0]);
    scheduler.submit(1, of(Priority::Low)).unwrap();
    scheduler.submit(2, of(Priority::Normal)).unwrap();
    scheduler.submit(3, of(Priority::High)).unwrap();
    let mut order = Vec::new();
    let (mut running, mut next) = (0, 4);
    while order.last() != Some(&1) {
        // One more of a high class comes for each that is done.
        scheduler.submit(next, of(Priority::High)).unwrap();
        next += 1;
        scheduler.remove(running);
        running = scheduler.plan().admitted[0];
        order.push(running);
    }
    assert_eq!(order[..2], [3, 4], "in order within a class");
    assert_eq!(order.len(), OVERTAKEN_MAX as usize + 1, "{order:?}");
}

#[test]
fn what_cannot_be_served_is_refused() {
    let mut scheduler = Scheduler::new(LIMITS);
    let refusal = scheduler.submit(1, demand(1, 101)).unwrap_err();
    assert_eq!(refusal, TooLarge { needed: 101, budget: 100 });
}

/// A sequence as its caller would count it.
struct Life {
    prompt: usize,
    ready: usize,
    admitted: bool,
    prefilled: usize,
    /// Steps left to decode.
    steps: usize,
    kv_entries: usize,
    priority: Priority,
    /// Later ones that were admitted before it although it could start.
    overtaken: u32,
}

/// Random callers: some come, some leave, embeddings arrive when they like.
struct World {
    random: ChaCha12Rng,
    limits: SchedulerLimits,
    /// What the engine bounds.
    max_waiting: usize,
    scheduler: Scheduler,
    alive: BTreeMap<Ticket, Life>,
    next: Ticket,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = ChaCha12Rng::seed_from_u64(seed);
        let limits = SchedulerLimits {
            kv_entries: random.random_range(40..400),
            prefill_chunk: random.random_range(1..40),
        };
        let max_waiting = random.random_range(1..40);
        Self {
            random,
            limits,
            max_waiting,
            scheduler: Scheduler::new(limits),
            alive: BTreeMap::new(),
            next: 0,
        }
    }

    fn someone_comes(&mut self) {
        let (prompt, steps) = (self.random.random_range(1..60), self.random.random_range(1..20));
        let kv_entries = prompt + steps * self.random.random_range(1..4);
        let ready = self.random.random_range(0..=prompt);
        let priority = Priority::ALL[self.random.random_range(0..3)];
        let demand = Demand { prompt, ready, kv_entries, priority };
        if self.scheduler.waiting() < self.max_waiting && self.scheduler.submit(self.next, demand).is_ok() {
            let (admitted, prefilled, overtaken) = (false, 0, 0);
            let life = Life { prompt, ready, admitted, prefilled, steps, kv_entries, priority, overtaken };
            self.alive.insert(self.next, life);
        }
        self.next += 1;
    }

    fn things_happen(&mut self) {
        for ticket in self.alive.keys().copied().collect::<Vec<_>>() {
            if self.random.random_ratio(1, 60) {
                self.scheduler.remove(ticket);
                self.alive.remove(&ticket);
            } else if self.random.random_ratio(1, 3) {
                let life = self.alive.get_mut(&ticket).expect("it is alive");
                life.ready = life.prompt;
                self.scheduler.set_ready(ticket, life.ready);
            }
        }
    }

    fn step(&mut self) {
        let plan = self.scheduler.plan();
        let chunk = self.limits.prefill_chunk;
        let can_start = |life: &Life| life.ready >= life.prompt.min(chunk);
        for ticket in &plan.admitted {
            let life = self.alive.get_mut(ticket).expect("only the living are admitted");
            assert!(can_start(life) && !life.admitted, "with its first chunk, once");
            life.admitted = true;
        }
        let admitted: Vec<_> =
            plan.admitted.iter().map(|ticket| (*ticket, self.alive[ticket].priority)).collect();
        for (waiting, life) in self.alive.iter_mut().filter(|(_, life)| can_start(life) && !life.admitted) {
            let later = admitted.iter().filter(|(ticket, _)| ticket > waiting);
            for (_, priority) in later {
                assert!(
                    *priority > life.priority,
                    "first come, first served, of those of a class who can start"
                );
                life.overtaken += 1;
            }
            assert!(life.overtaken <= OVERTAKEN_MAX);
        }
        assert!(self.scheduler.reserved() <= self.limits.kv_entries, "the budget holds");
        let running = self.alive.values().filter(|life| life.admitted);
        assert_eq!(self.scheduler.reserved(), running.map(|life| life.kv_entries).sum::<usize>());
        let mut chunk = 0;
        for (ticket, work) in plan.work {
            let life = self.alive.get_mut(&ticket).expect("only the living work");
            match work {
                Work::Prefill(positions) => {
                    assert_eq!(positions.start, life.prefilled, "no position twice, none left out");
                    life.prefilled = positions.end;
                    chunk += positions.len();
                }
                Work::Decode => {
                    assert_eq!(life.prompt, life.prefilled);
                    life.steps -= 1;
                    if life.steps == 0 {
                        self.alive.remove(&ticket);
                        self.scheduler.remove(ticket);
                    }
                }
            }
        }
        assert!(chunk <= self.limits.prefill_chunk);
    }
}

#[test]
fn under_any_schedule_the_budget_holds_and_everyone_is_served() {
    for seed in 0..30 {
        let mut world = World::new(seed);
        for _ in 0..200 {
            for _ in 0..world.random.random_range(0..3) {
                world.someone_comes();
            }
            world.things_happen();
            world.step();
        }
        let mut rounds = 0;
        while !world.alive.is_empty() {
            world.things_happen();
            world.step();
            rounds += 1;
            assert!(rounds < 5000, "everyone is served in the end");
        }
        let Scheduler { reserved, running, waiting, .. } = world.scheduler;
        assert!(reserved == 0 && running.is_empty() && waiting.is_empty());
    }
}
